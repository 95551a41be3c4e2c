"""I-BAU (Zeng et al., ICLR 2022): finds and unlearns one perturbation for all images, by an implicit hypergradient."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from bdprune.analysis import Case
from bdprune.data import CleanData
from bdprune.loops import ImplicitSettings, unlearn_perturbations
from bdprune.methods import Phases, Repair, Retraining
from bdprune.model import Model
from bdprune.record import check_settings

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"unlearning": ImplicitSettings(), "retries": 0, **Retraining.PUBLISHED},
    "robust": {},
}


@dataclass(frozen=True)
class IBAU(Retraining):
    """Searches perturbations that are the same for all images, and trains a copy to keep its predictions under them.

    The published learning rate ruins a wide network, because Adam moves each of its many weights by the same amount. So
    if no part of the way keeps the limit, the training is repeated with a tenth of the rate.

    Args:
        unlearning: settings of the search and of the training, which run in float32.
        max_drop: largest fall of clean accuracy on the held-out clean images, in [0, 1].
        held_out: share of the clean images that are held out for this decision, in (0, 1).
        ways: shares of the way to the retrained weights, in (0, 1]; the first that keeps ``max_drop`` is taken.
        retries: times that the training may be repeated, each with a tenth of the learning rate.
        seed: seed for the split and the order.
    """

    unlearning: ImplicitSettings = field(default_factory=ImplicitSettings)
    retries: int = 1

    id = "bdprune.ibau"
    title = "finds perturbations that are the same for all images, and trains against them"
    paper = "Zeng et al., Adversarial Unlearning of Backdoors via Implicit Hypergradient, ICLR 2022, arXiv 2110.03735"
    limits = "A share of a backdoor stays: clean accuracy limits how far the weights may move."
    presets = PRESETS

    def __post_init__(self) -> None:
        """Checks the number of repetitions."""
        super().__post_init__()
        check_settings(self, {"retries": 0})

    def __call__(self, case: Case) -> Repair:
        first = super().__call__(case)
        if first.change != "nothing" or not self.retries:
            return first
        slower = replace(self.unlearning, lr=self.unlearning.lr / 10)
        second = replace(self, unlearning=slower, retries=self.retries - 1)(case)
        seconds = {name: first.seconds[name] + spent for name, spent in second.seconds.items()}
        return replace(second, params=self.params, seconds=seconds, selection=f"with a lower rate: {second.selection}")

    def retrain(self, case: Case, data: CleanData, phase: Phases) -> Model:
        with phase("unlearn"):
            return unlearn_perturbations(case.model, data, self.unlearning, self.seed)
