"""What a purifier is, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from bdprune.data.clean import CleanData
from bdprune.model.handle import Model


@dataclass(frozen=True)
class CurvePoint:
    """Clean accuracy on held-out clean data (in [0, 1]) after pruning at ``threshold``."""

    threshold: float
    clean_accuracy: float
    filters_pruned: int


@dataclass(frozen=True)
class Purified:
    """A repaired model and how it came about.

    Attributes:
        model: the repaired model, same architecture and shapes as the one handed in.
        method: id of the purifier.
        pruned: group name -> indices of its pruned filters (groups with none are left out).
        num_filters: how many filters could have been pruned.
        masks: group name -> mask or score per filter ``[num_filters of the group]``, what the threshold was put on.
        threshold: the threshold that was chosen; NaN when the rule has no single one.
        threshold_rule: how it was chosen, in one phrase.
        accuracy_before: clean accuracy of the model handed in, on the held-out clean images, in [0, 1].
        accuracy_after: of the repaired one, on the same images.
        curve: clean accuracy against threshold.
        target_label: label that the method read off on the way, None when it reads none.
        unlearned: the unlearned model, for methods that make one.
        seconds: wall time of each phase.
        params: constructor settings, JSON values only.
    """

    model: Model
    method: str
    pruned: dict[str, list[int]]
    num_filters: int
    masks: dict[str, Tensor]
    threshold: float
    threshold_rule: str
    accuracy_before: float
    accuracy_after: float
    curve: tuple[CurvePoint, ...] = ()
    target_label: int | None = None
    unlearned: Model | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)


class Purifier(Protocol):
    """``purifier(model, data) -> Purified``; all settings are constructor arguments."""

    @property
    def id(self) -> str: ...

    def __call__(self, model: Model, data: CleanData) -> Purified: ...
