"""The description of a method: what it needs, costs and gives."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from bdprune.record.base import Count, Record

Images = Literal["none", "unlabelled", "labelled"]
Cost = Literal["weights", "forward", "gradients", "training"]
COSTS: tuple[Cost, ...] = ("weights", "forward", "gradients", "training")
"""What a method does with a model, the cheapest first: reads its weights, runs it, differentiates it, trains it."""

Gift = Literal["detection", "trigger recovery", "removal"]
GIFTS: tuple[Gift, ...] = ("detection", "trigger recovery", "removal")
"""The purposes of methods (RNP, Table 1)."""


class Needs(Record, frozen=True, kw_only=True):
    """The clean images that a method needs: their kind, their number, and their number in each class."""

    images: Images = "labelled"
    minimum: Count = 1
    per_class: Count = 0


class Rule(Record, frozen=True, kw_only=True):
    """The rule of a detector's findings: id, short name, and meaning."""

    id: Annotated[str, msgspec.Meta(pattern="^BD[0-9]{3}$")]
    name: str
    help: str


class MethodInfo(Record, frozen=True, kw_only=True):
    """The description of a method.

    If a ``decisive`` detector does not flag a model on suitable clean data, the verdict is ``clean``. ``limits`` says
    what the method cannot do by design; if it is empty, the conformance checks expect the method to find, or to
    remove, a planted backdoor. ``presets`` are named sets of settings, ``settings`` the defaults.
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
