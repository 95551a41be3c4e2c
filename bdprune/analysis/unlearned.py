"""The unlearned model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from bdprune.analysis.case import Analysis, Case
from bdprune.analysis.plain import PlainForm
from bdprune.errors import BdpruneError
from bdprune.loops import Unlearned, UnlearnSettings, unlearn, unlearn_stack
from bdprune.runtime import DEFAULT, Precision

SCAN_UNLEARNING = UnlearnSettings(weight_decay=5e-4, min_steps=8, raises=1)
"""How a scan unlearns. A repair with these settings on the same images goes on from there."""


@dataclass(frozen=True)
class Unlearning(Analysis[Unlearned]):
    """:func:`bdprune.loops.unlearn` of the model.

    Args:
        plain: unlearn the plain form of the model. Where that is the model itself, the outcome is known under either.
    """

    settings: UnlearnSettings = field(default_factory=UnlearnSettings)
    seed: int = 0
    precision: Precision = DEFAULT
    plain: bool = False

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """Images of each model in a step."""
        return self.settings.batch_size

    def compute(self, case: Case) -> Unlearned:
        if self.plain:
            return case.with_model(case.get(PlainForm())).get(replace(self, plain=False))
        return unlearn(case.model, case.images, self.settings, self.seed, self.precision)

    def compute_stack(self, cases: Sequence[Case]) -> Sequence[Unlearned | BdpruneError]:
        """All models in the same steps."""
        models = [case.get(PlainForm()) if self.plain else case.model for case in cases]
        outcomes = unlearn_stack(models, cases[0].images, self.settings, self.seed, self.precision)
        for case, model, outcome in zip(cases, models, outcomes, strict=True):
            if self.plain and model is case.model and not isinstance(outcome, BdpruneError):
                case.memo.put(case.key(replace(self, plain=False)), outcome)
        return outcomes
