"""NC+FT: searches triggers as Neural Cleanse does, and fine-tunes on images with the smallest one and true labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bdprune.analysis import CLEANSING, PUBLISHED_CLEANSING, Case, Triggers
from bdprune.data import CleanData
from bdprune.loops import (
    FineTuneSettings,
    Hypothesis,
    InvertSettings,
    KeptPruned,
    Recovery,
    StampedLabels,
    Stamping,
    Trigger,
    TuningObjective,
    fine_tune,
)
from bdprune.methods import Phases, Purifier, Repair, hold_out, sure_drop
from bdprune.record import Needs
from bdprune.runtime import DEFAULT, Precision

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "search": PUBLISHED_CLEANSING,
        "stamping": Stamping(share=0.2, jitter=0.0, shift=0),
        "tuning": FineTuneSettings(lr=0.01, epochs=1),
        "max_drop": 1.0,
    },
    "robust": {},
}


@dataclass(frozen=True)
class NCFineTuning(Purifier):
    """Fine-tunes on clean images, some of which carry the smallest trigger that Neural Cleanse finds.

    A trigger is searched for every label, and the label with the smallest one counts as the target. The images keep
    their true labels, so the network learns to ignore the trigger. The method does not ask whether that trigger is
    unusually small: on a clean network it unlearns an ordinary one.

    The preset ``paper`` is one pass over the images, 20 % of which carry the trigger, without a limit of the accuracy.

    Args:
        search: settings of the search.
        stamping: how the trigger is stamped.
        tuning: settings of the fine-tuning.
        max_drop: largest fall of clean accuracy on the held-out images, less its standard error
            (:func:`bdprune.methods.sure_drop`), in [0, 1]; beyond it nothing changes.
        held_out: share of the clean images held out for the accuracy.
        precision: precision of the fine-tuning (:func:`bdprune.runtime.plan_for`).
        seed: seed of the search, of the split and of the fine-tuning.
    """

    search: InvertSettings = CLEANSING
    stamping: Stamping = field(default_factory=Stamping)
    tuning: FineTuneSettings = field(
        default_factory=lambda: FineTuneSettings(lr=0.005, epochs=10, schedule="cosine", clip=1.0)
    )
    max_drop: float = 0.03
    held_out: float = 0.3
    precision: Precision = DEFAULT
    seed: int = 0

    id = "bdprune.nc_fine_tuning"
    title = "fine-tunes on images with the smallest trigger of Neural Cleanse and true labels (NC+FT)"
    paper = "Wang et al., Neural Cleanse, S&P 2019, Section VI.C; Li et al., ICML 2023, arXiv 2305.14876, Table 15"
    needs = Needs(images="labelled", minimum=20)
    cost = "training"
    gives = ("removal", "trigger recovery")
    label = True
    limits = "It removes backdoors whose trigger Neural Cleanse recovers. A weak trigger leaves a part of them."
    presets = PRESETS

    def __call__(self, case: Case) -> Repair:
        """Repairs a copy of the model.

        Raises:
            DataError: there are too few clean images.
            TrainingError: the loss of the fine-tuning is not finite.
        """
        self.check(case)
        phase = Phases()
        rest, held = hold_out(case.images, self.held_out, self.seed)
        with phase("search"):
            trigger = self.smallest_trigger(case)
        if trigger is None:
            nothing = "nothing is changed: no trigger flips most images"
            return self.repair(case, case.model, held, selection=nothing, seconds=phase.seconds)
        with phase("fine_tune"):
            objective = self._objective(trigger)
            tuned = fine_tune(case.model, rest, self.tuning, KeptPruned(), self.seed, self.precision, objective)
        kept = sure_drop(case.model, tuned, held) <= self.max_drop
        return self.repair(
            case,
            tuned if kept else case.model,
            held,
            retrained=kept,
            selection=self._selection(trigger, kept, held),
            target_label=trigger.target,
            seconds=phase.seconds,
        )

    def smallest_trigger(self, case: Case) -> Trigger | None:
        """The smallest trigger that leads to one label; None if none flips most images.

        Raises:
            DataError: there is no image to search with.
        """
        best = min(self.recoveries(case, self.search), key=lambda one: one.size)
        return best.trigger if math.isfinite(best.size) else None

    def recoveries(self, case: Case, search: InvertSettings) -> tuple[Recovery, ...]:
        """The best trigger to each label."""
        labels = tuple(Hypothesis(label) for label in range(case.model.num_classes))
        return case.get(Triggers(search, hypotheses=labels, seed=self.seed)).recoveries

    def _objective(self, trigger: Trigger) -> TuningObjective:
        return StampedLabels([trigger], self.stamping, self.seed)

    def _selection(self, trigger: Trigger, kept: bool, held: CleanData) -> str:
        drop = f"{100 * self.max_drop:g} points on {len(held)} held-out images"
        if not kept:
            return f"nothing is changed: unlearning the smallest trigger, to label {trigger.target}, costs over {drop}"
        return f"the smallest trigger leads to label {trigger.target}; unlearning it costs at most {drop}"
