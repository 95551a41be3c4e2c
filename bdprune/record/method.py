"""The description of a method: what it needs, costs and gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from bdprune.record.base import Count, Record

Images = Literal["none", "unlabelled", "labelled"]
Cost = Literal["weights", "forward", "gradients", "training"]
COSTS: tuple[Cost, ...] = ("weights", "forward", "gradients", "training")
"""What a method does with a model, the cheapest first: reads its weights, runs it, differentiates it, trains it."""

Sign = Literal["trigger", "collapse", "pruning", "perturbation", "margin", "filters", "other"]
SIGNS: Mapping[Sign, str] = {
    "trigger": "a recovered trigger that works on held-out images",
    "collapse": "a collapse of the predictions onto one label under unlearning",
    "pruning": "a trigger that fails once the few filters that it raises are pruned",
    "perturbation": "small changes of images that lead to one label",
    "margin": "a label with an outlying margin",
    "filters": "outlying filters",
    "other": "another sign of a backdoor",
}
"""The kinds of evidence, each as a phrase."""

STRONG: tuple[Sign, ...] = ("collapse", "trigger", "pruning")
"""Kinds of evidence of which two make a model backdoored. The other kinds alone can only make it suspicious."""

NEEDED: tuple[Sign, ...] = ("collapse", "trigger")
"""Kinds of evidence that must be looked for before a model is called clean."""

Level = Literal["fast", "default", "full"]
LEVELS: tuple[Level, ...] = ("fast", "default", "full")
"""How far a scan goes, the least first."""

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

    ``sign`` is the kind of evidence of a detector (:data:`SIGNS`), and ``level`` the least budget at which a scan runs
    it, None if a scan runs it only by name; both are None for a purifier. ``limits`` says what the method cannot do by
    design; if it is empty, the conformance checks expect the method to find, or to remove, a planted backdoor.
    ``presets`` are named sets of settings, ``settings`` the defaults.
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
    sign: Sign | None = None
    level: Level | None = None
    rule: Rule | None = None
    limits: str = ""
    presets: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)
    settings: dict[str, Any] = msgspec.field(default_factory=dict)
