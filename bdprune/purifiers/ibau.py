"""I-BAU (Zeng et al., ICLR 2022): finds and unlearns one perturbation for all images, by an implicit hypergradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bdprune.analysis import Case
from bdprune.data import CleanData
from bdprune.loops import ImplicitSettings, unlearn_perturbations
from bdprune.methods import Phases, Retraining
from bdprune.model import Model

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"unlearning": ImplicitSettings(), **Retraining.PUBLISHED},
    "robust": {},
}


@dataclass(frozen=True)
class IBAU(Retraining):
    """Searches perturbations that are the same for all images, and trains a copy to keep its predictions under them.

    Args:
        unlearning: settings of the search and of the training, which run in float32.
        max_drop: largest fall of clean accuracy on the held-out clean images, in [0, 1].
        held_out: share of the clean images that are held out for this decision, in (0, 1).
        ways: shares of the way to the retrained weights, in (0, 1]; the first that keeps ``max_drop`` is taken.
        seed: seed for the split and the order.
    """

    unlearning: ImplicitSettings = field(default_factory=ImplicitSettings)

    id = "bdprune.ibau"
    title = "finds perturbations that are the same for all images, and trains against them"
    paper = "Zeng et al., Adversarial Unlearning of Backdoors via Implicit Hypergradient, ICLR 2022, arXiv 2110.03735"
    limits = "A share of a backdoor stays: clean accuracy limits how far the weights may move."
    presets = PRESETS

    def retrain(self, case: Case, data: CleanData, phase: Phases) -> Model:
        with phase("unlearn"):
            return unlearn_perturbations(case.model, data, self.unlearning, self.seed)
