"""The recovered triggers of a case, computed once for all methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from bdprune.analysis.case import Analysis, Case
from bdprune.analysis.latent import promising_labels
from bdprune.errors import BdpruneError
from bdprune.loops import Hypothesis, Inversion, InvertSettings, every_target, invert
from bdprune.record import Level, TriggerKind

MOST_LABELS: Mapping[Level, int | None] = {"fast": 50, "default": 100, "full": None}
"""The number of target labels that are searched at each budget; None for all."""


@dataclass(frozen=True)
class Triggers(Analysis[Inversion]):
    """:func:`bdprune.loops.invert` of the model.

    Without given hypotheses it searches an untargeted trigger and a trigger to every label. A network with more labels
    than the budget allows (:data:`MOST_LABELS`) is searched for those that its features reach most easily
    (:func:`bdprune.analysis.promising_labels`); the result names the others as skipped. With a time limit, the labels
    come in that order, and the last ones are skipped if time is short.

    Args:
        settings: of the search.
        kind: of the triggers.
        hypotheses: what to search; empty for the above.
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
        wanted = self._wanted(case)
        found = invert([case.model], case.images, wanted, self.settings, self.seed, self.seconds)[0]
        return self._with_left_out(found, case, wanted)

    def compute_stack(self, cases: Sequence[Case]) -> Sequence[Inversion | BdpruneError]:
        """All models in the same steps, if the same labels are searched."""
        wanted, *others = [self._wanted(case) for case in cases]
        if any(one != wanted for one in others):
            return super().compute_stack(cases)
        models, images = [case.model for case in cases], cases[0].images
        found = invert(models, images, wanted, self.settings, self.seed, self.seconds)
        return [self._with_left_out(one, case, wanted) for one, case in zip(found, cases, strict=True)]

    def _wanted(self, case: Case) -> tuple[Hypothesis, ...]:
        """What to search; what matters most comes first if not all of it may be."""
        every = self.hypotheses or every_target(case.model.num_classes, self.kind)
        most = MOST_LABELS[case.budget.level] or len(every)
        if self.hypotheses or (self.seconds is None and case.model.num_classes <= most):
            return every
        labels = promising_labels(case, most).tolist()
        return (every[-1], *(every[label] for label in labels))

    def _with_left_out(self, found: Inversion, case: Case, wanted: Sequence[Hypothesis]) -> Inversion:
        """The result with the labels among its skipped ones that were left out from the start."""
        every = self.hypotheses or every_target(case.model.num_classes, self.kind)
        left_out = tuple(one for one in every if one not in set(wanted))
        return replace(found, skipped=(*found.skipped, *left_out))
