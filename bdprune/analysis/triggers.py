"""The recovered triggers of a case, computed once for all methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from bdprune.analysis.case import Analysis, Case
from bdprune.errors import BdpruneError
from bdprune.loops import Hypothesis, Inversion, InvertSettings, every_target, invert
from bdprune.record import TriggerKind


@dataclass(frozen=True)
class Triggers(Analysis[Inversion]):
    """:func:`bdprune.loops.invert` of the model.

    Args:
        settings: of the search.
        kind: of the triggers.
        hypotheses: what to search; empty for every target label and an untargeted trigger.
        seed: seed of the search.
        seconds: time limit; None for none. Analyses that differ only in this are equal: the first result is shared.
    """

    uses_budget: ClassVar[bool] = True

    settings: InvertSettings = field(default_factory=InvertSettings)
    kind: TriggerKind = "patch"
    hypotheses: tuple[Hypothesis, ...] = ()
    seed: int = 0
    seconds: float | None = field(default=None, compare=False)

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """Images of each model in one step."""
        return max(stage.images for stage in self.settings.stages)

    def compute(self, case: Case) -> Inversion:
        return invert([case.model], case.images, self._wanted(case), self.settings, self.seed, self.seconds)[0]

    def compute_stack(self, cases: Sequence[Case]) -> Sequence[Inversion | BdpruneError]:
        """All models in the same steps."""
        models, first = [case.model for case in cases], cases[0]
        return invert(models, first.images, self._wanted(first), self.settings, self.seed, self.seconds)

    def _wanted(self, case: Case) -> tuple[Hypothesis, ...]:
        return self.hypotheses or every_target(case.model.num_classes, self.kind)
