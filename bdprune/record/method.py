"""What a method says of itself: what it needs, what it costs, what it gives."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from bdprune.record.base import Count, Record

Images = Literal["none", "unlabelled", "labelled"]
Cost = Literal["weights", "forward", "gradients", "training"]
COSTS: tuple[Cost, ...] = ("weights", "forward", "gradients", "training")
"""What a method does with a model, the cheapest first: read its weights, run it, differentiate it, train it."""

Gift = Literal["detection", "trigger recovery", "removal"]
GIFTS: tuple[Gift, ...] = ("detection", "trigger recovery", "removal")
"""What a method helps with (RNP, Table 1)."""


class Needs(Record, frozen=True, kw_only=True):
    """The clean images that a method needs: of what kind, how many in all, and how many of each class."""

    images: Images = "labelled"
    minimum: Count = 1
    per_class: Count = 0


class Rule(Record, frozen=True, kw_only=True):
    """The rule under which a detector's findings are reported: id, short name, and what it means."""

    id: Annotated[str, msgspec.Meta(pattern="^BD[0-9]{3}$")]
    name: str
    help: str


class MethodInfo(Record, frozen=True, kw_only=True):
    """A method as it describes itself.

    ``decisive`` says of a detector whether its silence on sound clean data makes a model clean. ``limits`` says what
    the method cannot do by design; empty when the conformance checks expect it to find, or to remove, a planted
    backdoor. ``presets`` names sets of settings, ``settings`` holds the default ones.
    """

    id: str
    name: str
    kind: Literal["detector", "purifier"]
    title: str
    paper: str
    needs: Needs
    cost: Cost
    gives: tuple[Gift, ...]
    label: bool = False
    stackable: bool = False
    decisive: bool = False
    rule: Rule | None = None
    limits: str = ""
    presets: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)
    settings: dict[str, Any] = msgspec.field(default_factory=dict)
