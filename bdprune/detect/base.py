"""What a detector is, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from bdprune.data.clean import CleanData
from bdprune.errors import BdpruneError
from bdprune.model.handle import Model


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
