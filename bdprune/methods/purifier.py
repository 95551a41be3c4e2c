"""The base class of purifiers, and the repaired model that one returns."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from bdprune.analysis import Case
from bdprune.data import CleanData
from bdprune.errors import OptionError
from bdprune.methods.base import Method
from bdprune.model import Model, rounded
from bdprune.record import Attachment, Attempt, Change, Gift, RepairCheck, check_shares, notebook_form
from bdprune.runtime import clean_accuracy

_DROPS = {"max_drop", "safe_drop", "prune_drop", "tuned_drop", "regained_drop"}
"""Settings that limit the fall of the clean accuracy; a negative one asks for a rise."""


@dataclass(frozen=True)
class CurvePoint:
    """Clean accuracy on held-out clean data (in [0, 1]) after pruning at ``threshold``."""

    threshold: float
    clean_accuracy: float
    filters_pruned: int


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A repaired model and how it was made.

    Attributes:
        model: the repaired model, with the architecture and shapes of the input model.
        method: id of the purifier.
        change: change of the weights: ``nothing``, ``pruned``, ``retrained`` or ``pruned and retrained``.
        selection: how the pruned filters were chosen, in one phrase.
        accuracy_before: clean accuracy of the input model, in [0, 1]; on held-out images if the method holds some out.
            NaN if there are no clean images.
        accuracy_after: the same for the repaired model, on the same images.
        pruned: group name -> indices of its pruned filters (groups without pruned filters are omitted).
        num_filters: number of filters that could have been pruned.
        masks: group name -> mask or score per filter ``[num_filters of the group]`` that the threshold applies to.
        threshold: the chosen threshold; NaN if there is no single one.
        curve: clean accuracy against threshold.
        target_label: label that the method determined, None if it determines none.
        seconds: wall time of each phase.
        params: constructor settings, JSON values only.
        attachments: tensors and pictures, such as the masks.
        check: what clean images show; None if the method does not look.
        attempts: the methods that were tried, for a method that chooses among several.
    """

    model: Model
    method: str
    change: Change
    selection: str
    accuracy_before: float
    accuracy_after: float
    pruned: dict[str, list[int]] = field(default_factory=dict)
    num_filters: int = 0
    masks: dict[str, Tensor] = field(default_factory=dict)
    threshold: float = float("nan")
    curve: tuple[CurvePoint, ...] = ()
    target_label: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    attachments: tuple[Attachment, ...] = ()
    check: RepairCheck | None = None
    attempts: tuple[Attempt, ...] = ()

    def _repr_html_(self) -> str:
        return notebook_form(self)


def limits_of(settings: Container[str], drop: float | None) -> dict[str, float | None]:
    """The settings for a limit on clean accuracy: before a fine-tuning, and after it if the method can set it."""
    return {"max_drop": drop} | ({"regained_drop": drop} if "regained_drop" in settings else {})


class Purifier(Method):
    """A method that removes a backdoor: ``purifier(case) -> Repair``. It never changes the model of the case."""

    kind = "purifier"
    threshold_name: ClassVar[str] = ""
    """The setting that fixes the threshold; if it is given, ``max_drop`` limits nothing. Empty without such a one."""
    gives: ClassVar[tuple[Gift, ...]] = ("removal",)
    checks_itself: ClassVar[bool] = False
    """Whether each of its repairs has a check."""

    def __post_init__(self) -> None:
        """Refuses an unknown choice, and a limit on clean accuracy that no fall can have."""
        super().__post_init__()
        check_shares(self, self.settings() & _DROPS, least=-1)

    @abstractmethod
    def __call__(self, case: Case) -> Repair:
        """Repairs a copy of the model.

        Raises:
            DataError: there are too few clean images.
            TrainingError: an optimisation gave values that are not finite.
        """

    def refuse_two_limits(self, max_drop: float | None) -> None:
        """A given threshold prunes whatever it costs, so a limit that is given beside it would mean nothing.

        Raises:
            OptionError: both are given.
        """
        threshold = getattr(self, self.threshold_name) if self.threshold_name else None
        if max_drop is not None and threshold is not None:
            raise OptionError(
                f"No limit on clean accuracy changes the given threshold of {self.id} "
                f"({self.threshold_name} = {threshold:g}).",
                "Leave out --max-acc-drop, or choose a preset without a threshold.",
            )

    def repair(
        self,
        case: Case,
        model: Model,
        data: CleanData | None,
        *,
        pruned: Mapping[str, list[int]] | None = None,
        retrained: bool = False,
        **more: Any,
    ) -> Repair:
        """The record of a repair by this method, of the weights that the file of the model can hold.

        Args:
            case: the case before the repair.
            model: the repaired model.
            data: clean images that both accuracies are measured on; without them the accuracies are NaN.
            pruned: group name -> indices of its pruned filters.
            retrained: whether other weights than those of pruned filters changed.
            more: further fields of :class:`Repair`; ``selection`` is required.
        """
        cut = {name: index for name, index in (pruned or {}).items() if index}
        more.setdefault("num_filters", sum(group.num_filters for group in case.model.groups))
        more.setdefault("params", self.params)
        model = rounded(model)
        return Repair(
            model=model,
            method=self.id,
            change=what_changed(pruned=bool(cut), retrained=retrained),
            pruned=cut,
            accuracy_before=accuracy_on(case.model, data),
            accuracy_after=accuracy_on(model, data),
            **more,
        )


def accuracy_on(model: Model, data: CleanData | None) -> float:
    """Clean accuracy on ``data``, in [0, 1]; NaN without data."""
    return math.nan if data is None else clean_accuracy(model.module, data.images, data.labels)


def what_changed(*, pruned: bool, retrained: bool) -> Change:
    """The name of the change of the weights."""
    if pruned:
        return "pruned and retrained" if retrained else "pruned"
    return "retrained" if retrained else "nothing"


class Phases:
    """Wall time of the phases of a repair, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times the code within it as phase ``name``."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
