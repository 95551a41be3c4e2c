"""Fine-tuning on clean images: the baseline that other repairs are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bdprune.analysis import Case
from bdprune.data import CleanData
from bdprune.loops import FineTuneSettings, fine_tune
from bdprune.methods import Phases, Retraining
from bdprune.model import Model
from bdprune.runtime import DEFAULT, Precision

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "tuning": FineTuneSettings(epochs=100, batch_size=256, schedule="cosine", small_data=0),
        **Retraining.PUBLISHED,
    },
    "robust": {},
}


@dataclass(frozen=True)
class FineTuning(Retraining):
    """Trains all weights of a copy on clean images with the cross-entropy.

    The preset ``paper`` has the settings of BackdoorBench (Wu et al., NeurIPS 2022).

    Args:
        tuning: settings of the training.
        max_drop: largest fall of clean accuracy on the held-out clean images, in [0, 1].
        held_out: share of the clean images that are held out for this decision, in (0, 1).
        ways: shares of the way to the retrained weights, in (0, 1]; the first that keeps ``max_drop`` is taken.
        precision: precision of the training (:func:`bdprune.runtime.precision.plan_for`).
        seed: seed for the split, the order and the augmentation.
    """

    tuning: FineTuneSettings = field(default_factory=lambda: FineTuneSettings(lr=0.03, batch_size=32))
    precision: Precision = DEFAULT

    id = "bdprune.fine_tuning"
    title = "trains all weights on clean images"
    paper = "Wu et al., BackdoorBench, NeurIPS 2022, arXiv 2206.12654"
    limits = "Fine-tuning on clean images has no reason to remove a backdoor; it is a baseline."
    presets = PRESETS

    def retrain(self, case: Case, data: CleanData, phase: Phases) -> Model:
        with phase("fine_tune"):
            return fine_tune(case.model, data, self.tuning, seed=self.seed, precision=self.precision)
