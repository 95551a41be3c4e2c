"""Neural attention distillation (Li et al., ICLR 2021): a fine-tuned copy teaches another where to look."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from bdprune.analysis import Case
from bdprune.data import CleanData
from bdprune.errors import OptionError
from bdprune.loops import AttentionDistillation, FineTuneSettings, fine_tune, last_maps
from bdprune.methods import Phases, Retraining
from bdprune.model import Model
from bdprune.runtime import DEFAULT, Precision

_STEEP = FineTuneSettings(
    lr=0.1, weight_decay=1e-4, epochs=10, nesterov=True, schedule="steps", milestones=(2,), small_data=0
)
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "teaching": _STEEP,
        "distilling": FineTuneSettings(
            lr=0.1, weight_decay=1e-4, epochs=20, nesterov=True, schedule="steps", milestones=(2,), small_data=0
        ),
        **Retraining.PUBLISHED,
    },
    "robust": {},
}


@dataclass(frozen=True)
class NAD(Retraining):
    """Fine-tunes a copy, the teacher, and trains another, the student, to have the attention maps of the teacher.

    The maps are those of the last layers of up to three resolutions, the smallest that have several positions.

    Args:
        betas: weight of the maps of each resolution in the loss, at least 0, from the largest map to the smallest; a
            network with fewer resolutions uses the last ones.
        teaching: settings of the training of the teacher.
        distilling: settings of the training of the student.
        max_drop: largest fall of clean accuracy on the held-out clean images, in [0, 1].
        held_out: share of the clean images that are held out for this decision, in (0, 1).
        ways: shares of the way to the retrained weights, in (0, 1]; the first that keeps ``max_drop`` is taken.
        precision: precision of both trainings (:func:`bdprune.runtime.precision.plan_for`).
        seed: seed for the split, the order and the augmentation.

    Raises:
        OptionError: there are no betas, or one is below 0.
    """

    betas: tuple[float, ...] = (500.0, 1000.0, 1000.0)
    teaching: FineTuneSettings = field(
        default_factory=lambda: FineTuneSettings(
            lr=0.02, weight_decay=1e-4, epochs=10, nesterov=True, schedule="cosine"
        )
    )
    distilling: FineTuneSettings = field(
        default_factory=lambda: FineTuneSettings(
            lr=0.02, weight_decay=1e-4, epochs=20, nesterov=True, schedule="cosine"
        )
    )
    precision: Precision = DEFAULT

    id = "bdprune.nad"
    title = "trains a student to have the attention maps of a fine-tuned teacher"
    paper = (
        "Li et al., Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks, ICLR 2021, "
        "arXiv 2101.05930"
    )
    presets = PRESETS

    def __post_init__(self) -> None:
        """Checks the betas."""
        super().__post_init__()
        if not self.betas:
            raise OptionError(f"{self.id} needs a beta for at least one resolution.", "Give one to three betas.")
        if not all(0 <= beta < math.inf for beta in self.betas):
            raise OptionError(f"{self.id} cannot take the betas {self.betas}.", "Give finite numbers of at least 0.")

    def retrain(self, case: Case, data: CleanData, phase: Phases) -> Model:
        maps = last_maps(case.model, len(self.betas))
        with phase("teach"):
            teacher = fine_tune(case.model, data, self.teaching, seed=self.seed, precision=self.precision)
        objective = AttentionDistillation(teacher, maps, self.betas[-len(maps) :])
        with phase("distil"):
            return fine_tune(
                case.model, data, self.distilling, seed=self.seed + 1, precision=self.precision, objective=objective
            )
