"""The recovered triggers of a case, computed once for all methods."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from bdprune.analysis.case import Analysis, Case
from bdprune.analysis.latent import LabelOrder
from bdprune.errors import BdpruneError
from bdprune.loops import Hypothesis, Inversion, InvertSettings, every_target, invert
from bdprune.record import Level, TriggerKind

MOST_LABELS: Mapping[Level, int | None] = {"fast": 50, "default": 100, "full": None}
"""The number of target labels that are searched at each budget; None for all."""


@dataclass(frozen=True)
class Triggers(Analysis[Inversion]):
    """:func:`bdprune.loops.invert` of the model.

    Without given hypotheses it searches for an untargeted trigger and for a trigger to every label. If a network has
    more labels than the budget allows (:data:`MOST_LABELS`), it takes those that the features reach most easily
    (:class:`bdprune.analysis.LabelOrder`); the result names the others as skipped. With a time limit, the labels come
    in that order, and the last ones are skipped if time is short.

    Args:
        settings: of the search.
        kind: of the triggers.
        hypotheses: what to search for; empty for the above.
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
        start = time.perf_counter()
        wanted = self._wanted(case)
        left = None if self.seconds is None else max(0.0, self.seconds - (time.perf_counter() - start))
        found = invert([case.model], case.images, wanted, self.settings, self.seed, left)[0]
        return self._with_left_out(found, case, wanted)

    def compute_stack(self, cases: Sequence[Case]) -> Sequence[Inversion | BdpruneError]:
        """All models in the same steps; one after another if they do not search the same labels."""
        wanted, *others = [self._wanted(case) for case in cases]
        if any(one != wanted for one in others):
            seconds = None if self.seconds is None else self.seconds / len(cases)
            return Analysis.compute_stack(replace(self, seconds=seconds), cases)
        models, images = [case.model for case in cases], cases[0].images
        found = invert(models, images, wanted, self.settings, self.seed, self.seconds)
        return [self._with_left_out(one, case, wanted) for one, case in zip(found, cases, strict=True)]

    def _wanted(self, case: Case) -> tuple[Hypothesis, ...]:
        """What to search for; if that may not be everything, the most promising hypotheses come first."""
        every = self._every(case)
        most = MOST_LABELS[case.budget.level] or case.model.num_classes
        if self.hypotheses or (self.seconds is None and case.model.num_classes <= most):
            return every
        labels = case.get(LabelOrder())[:most].tolist()
        return (every[-1], *(every[label] for label in labels))

    def _every(self, case: Case) -> tuple[Hypothesis, ...]:
        return self.hypotheses or every_target(case.model.num_classes, self.kind)

    def _with_left_out(self, found: Inversion, case: Case, wanted: Sequence[Hypothesis]) -> Inversion:
        """The result with the labels among its skipped ones that were left out from the start."""
        searched = set(wanted)
        left_out = tuple(one for one in self._every(case) if one not in searched)
        return replace(found, skipped=(*found.skipped, *left_out))
