"""Adversarial Weight Masking (Chai and Chen, NeurIPS 2022): weaken the weights that a perturbation can misuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from bdprune.analysis import Case
from bdprune.data import CleanData
from bdprune.loops import SoftMasks, SoftMaskSettings, soft_masks
from bdprune.methods import Phases, Purifier, Repair, hold_out, views_drop
from bdprune.model import Model, rounded
from bdprune.record import Needs
from bdprune.runtime import DEFAULT, Precision, within

_STEPS = 10  # of the strength


@dataclass(frozen=True)
class AWM(Purifier):
    """Learns a factor in [0, 1] for every weight of the convs, under one perturbation of all images; multiplies them.

    The factors are soft, and stay so: the authors report that a threshold on them loses clean accuracy. Nothing is
    pruned. The masks of a narrow network cost more clean accuracy than the limit allows. So each factor m becomes
    ``1 - strength (1 - m)`` with the largest strength, in steps of a tenth, that keeps the clean accuracy.

    The preset ``one_shot`` is for one image of each class. It crops and mirrors the copies of an image, where the paper
    also resizes them.

    Args:
        masking: settings of the masks.
        max_drop: largest fall of clean accuracy on views of the held-out images (:func:`bdprune.methods.views_drop`),
            in [0, 1].
        held_out: share of the clean images held out for choosing the strength, in (0, 1); 0 judges on the images on
            which the masks are learned, for one image of each class.
        precision: precision of the training (:func:`bdprune.runtime.plan_for`).
        seed: seed for the split, the order and the augmentation.
    """

    masking: SoftMaskSettings = field(default_factory=lambda: SoftMaskSettings(epochs=10))
    max_drop: float = 0.04
    held_out: float = 0.3
    precision: Precision = DEFAULT
    seed: int = 0

    id = "bdprune.awm"
    title = "learns a soft mask for every weight under a universal perturbation"
    paper = "Chai and Chen, One-shot Neural Backdoor Erasing via Adversarial Weight Masking, NeurIPS 2022"
    needs = Needs(images="labelled")
    cost = "training"
    limits = "It weakens a backdoor instead of cutting it out; one may survive what the limit on clean accuracy allows."
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"masking": SoftMaskSettings(), "max_drop": 1.0},
        "one_shot": {
            "masking": SoftMaskSettings(batch_size=32, alpha=0.99, radius=100.0, copies=10),
            "max_drop": 1.0,
            "held_out": 0.0,
        },
        "robust": {},
    }

    def __call__(self, case: Case) -> Repair:
        """Repairs a copy of the model.

        Raises:
            ArchitectureError: no conv has a weight of its own.
            DataError: there are no clean images, or no class has an image to hold out.
            TrainingError: a loss of the masks is not finite.
        """
        self.check(case)
        data, phase = case.images, Phases()
        rest, held = hold_out(data, self.held_out, self.seed) if self.held_out else (data, data)
        with phase("masks"):
            masked = soft_masks(case.model, rest, self.masking, self.seed, self.precision)
        with phase("strength"):
            model, strength = self._choose(case.model, masked, held)
        return self.repair(
            case,
            model,
            held,
            retrained=strength > 0,
            selection=self._selection(strength, len(held)),
            seconds=phase.seconds,
        )

    def _choose(self, model: Model, masked: SoftMasks, held: CleanData) -> tuple[Model, float]:
        """The model with the largest strength within the limit, and this strength; 0 if there is none."""
        for step in range(_STEPS, 0, -1):
            found = rounded(masked.model(step / _STEPS))
            if within(views_drop(model, found, held, self.seed), self.max_drop):
                return found, step / _STEPS
        return model.clone(), 0.0

    def _selection(self, strength: float, held: int) -> str:
        what = "held-out images" if self.held_out else "images, on which the masks were learned"
        cost = f"{100 * self.max_drop:g} points on views of {held} {what}"
        if not strength:
            return f"nothing is changed: the masks at every strength cost more than {cost}"
        return f"masks at {strength:.0%} of their strength, the most that costs at most {cost}"
