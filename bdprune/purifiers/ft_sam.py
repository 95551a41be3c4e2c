"""FT-SAM (Zhu et al., ICCV 2023): fine-tuning with adaptive sharpness-aware steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bdprune.analysis import Case
from bdprune.data import CleanData
from bdprune.errors import OptionError
from bdprune.loops import FineTuneSettings, SharpnessAware, fine_tune
from bdprune.methods import Phases, Retraining
from bdprune.model import Model
from bdprune.record import check_settings
from bdprune.runtime import DEFAULT, Precision

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "rho": 2.0,
        "tuning": FineTuneSettings(epochs=100, batch_size=256, schedule="cosine", small_data=0),
        **Retraining.PUBLISHED,
    },
    "robust": {},
}


@dataclass(frozen=True)
class FTSAM(Retraining):
    """Fine-tunes a copy at the worst weights near the current ones, which shrinks the large weights of a backdoor.

    Args:
        rho: radius of the neighbourhood, relative to the size of each weight; at least 0.
        smoothing: label smoothing of the cross-entropy, in [0, 1).
        tuning: settings of the training.
        max_drop: largest fall of clean accuracy on the held-out clean images, in [0, 1].
        held_out: share of the clean images that are held out for this decision, in (0, 1).
        ways: shares of the way to the retrained weights, in (0, 1]; the first that keeps ``max_drop`` is taken.
        precision: precision of the training (:func:`bdprune.runtime.precision.plan_for`).
        seed: seed for the split, the order and the augmentation.
    """

    rho: float = 4.0
    smoothing: float = 0.1
    tuning: FineTuneSettings = field(
        default_factory=lambda: FineTuneSettings(lr=0.02, batch_size=32, epochs=30, schedule="cosine")
    )
    precision: Precision = DEFAULT

    id = "bdprune.ft_sam"
    title = "fine-tunes at the worst weights nearby, which shrinks the large weights of a backdoor"
    paper = (
        "Zhu et al., Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization, ICCV 2023, "
        "arXiv 2304.11823"
    )
    presets = PRESETS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, {"rho": 0, "smoothing": 0})
        if self.smoothing >= 1:
            raise OptionError(f"The label smoothing of {self.id} is {self.smoothing}.", "Give a share below 1.")

    def retrain(self, case: Case, data: CleanData, phase: Phases) -> Model:
        objective = SharpnessAware(self.rho, self.smoothing)
        with phase("fine_tune"):
            return fine_tune(
                case.model, data, self.tuning, seed=self.seed, precision=self.precision, objective=objective
            )
