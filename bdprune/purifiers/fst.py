"""Feature shift tuning (Min et al., NeurIPS 2023): a new head that must differ from the old one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bdprune.analysis import Case
from bdprune.data import CleanData
from bdprune.errors import OptionError
from bdprune.loops import FeatureShift, FineTuneSettings, fine_tune
from bdprune.methods import Phases, Retraining
from bdprune.model import Model, find_head
from bdprune.runtime import DEFAULT, Precision

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "tuning": FineTuneSettings(weight_decay=0.0, batch_size=128, epochs=10, schedule="cosine", small_data=0),
        **Retraining.PUBLISHED,
    },
    "robust": {},
}


@dataclass(frozen=True)
class FST(Retraining):
    """Starts a new head that must differ from the old one, and fine-tunes everything, so that the features move.

    Args:
        alpha: factor of the inner product of the new and the old head in the loss, at least 0; the paper has 0.1 for
            CIFAR-10.
        tuning: settings of the training.
        max_drop: largest fall of clean accuracy on the held-out clean images, in [0, 1].
        held_out: share of the clean images that are held out for this decision, in (0, 1).
        ways: shares of the way to the retrained weights, in (0, 1]; the first that keeps ``max_drop`` is taken.
        precision: precision of the training (:func:`bdprune.runtime.precision.plan_for`).
        seed: seed for the split, the new head, the order and the augmentation.
    """

    alpha: float = 0.1
    tuning: FineTuneSettings = field(
        default_factory=lambda: FineTuneSettings(lr=0.02, batch_size=32, epochs=60, schedule="cosine")
    )
    # Part of the way to a head that starts anew, neither of both heads fits the features.
    ways: tuple[float, ...] = (1.0,)
    precision: Precision = DEFAULT

    id = "bdprune.fst"
    title = "trains a new head that must differ from the old one, which moves the features"
    paper = (
        "Min et al., Towards Stable Backdoor Purification through Feature Shift Tuning, NeurIPS 2023, arXiv 2310.01875"
    )
    presets = PRESETS

    def retrain(self, case: Case, data: CleanData, phase: Phases) -> Model:
        head = find_head(case.model)
        if head is None:
            raise OptionError(
                f"{self.id} needs a linear layer that outputs the logits, and the network has none.",
                "Use another method, such as rnp.",
            )
        objective = FeatureShift(head.path, self.alpha, self.seed)
        with phase("fine_tune"):
            return fine_tune(
                case.model, data, self.tuning, seed=self.seed, precision=self.precision, objective=objective
            )
