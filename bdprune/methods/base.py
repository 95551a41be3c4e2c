"""What a method is: a detector gives evidence, a purifier a repaired model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from bdprune.data import CleanData
from bdprune.errors import BdpruneError
from bdprune.model import Model


@dataclass(frozen=True)
class Evidence:
    """What one detector saw in one model.

    Attributes:
        detector: its id, such as ``bdprune.unlearning``.
        score: the detector's statistic; larger is more suspicious.
        threshold: ``flagged`` is ``score > threshold``.
        flagged: whether the statistic is beyond the threshold.
        target_label: the label it names, None when it names none.
        seconds: wall time.
        params: constructor settings, JSON values only.
        details: whatever a report may draw, JSON values only.
    """

    detector: str
    score: float
    threshold: float
    flagged: bool
    target_label: int | None = None
    seconds: float = 0.0
    params: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


class Detector(Protocol):
    """``detector(model, data) -> Evidence``; all settings are constructor arguments."""

    @property
    def id(self) -> str: ...

    @property
    def needs_data(self) -> bool: ...

    def __call__(self, model: Model, data: CleanData | None) -> Evidence: ...


@runtime_checkable
class StackDetector(Detector, Protocol):
    """A detector that may also be given many models at once. It must see in each what it sees in that model alone.

    ``batch_size`` is the images of each model in a step of training, by which a scan reckons how many models fit into
    memory and tries whether they are faster together; 0 for a detector that does not train.
    """

    @property
    def batch_size(self) -> int: ...

    def together(self, models: Sequence[Model], data: CleanData | None) -> Sequence[Evidence | BdpruneError]:
        """For each of the models, of one architecture and on one device, its evidence, or the error that it alone
        would have raised. An exception that is raised sends every model through the detector by itself.
        """
        ...


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
