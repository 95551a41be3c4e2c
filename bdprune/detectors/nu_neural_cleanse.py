"""Neural Cleanse on the unlearned model (RNP, Appendix D: NU+NC)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from bdprune.analysis import CLEANSING, PUBLISHED_CLEANSING, SCAN_UNLEARNING, Case, Unlearning, with_own_statistics
from bdprune.detectors.neural_cleanse import NeuralCleanseDetector
from bdprune.loops import InvertSettings, UnlearnSettings
from bdprune.methods import Detector
from bdprune.model import Model
from bdprune.record import Evidence, Needs
from bdprune.runtime import DEFAULT, Precision

_ALL_IMAGES = replace(CLEANSING, only_right=False)

_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "search": PUBLISHED_CLEANSING,
        "threshold": 2.0,
        "least_spread": 0.0,
        "flip_rate": 0.0,
        "logarithmic": False,
        "unlearning": UnlearnSettings(stop_accuracy=0.1, stop_on="epoch", small_data=0, retries=0),
        "depth": "end",
    },
    "robust": {},
}


@dataclass(frozen=True)
class NUNeuralCleanseDetector(NeuralCleanseDetector):
    """Neural Cleanse on the unlearned model of the case, in which a trigger is easier to find.

    The paper searches on the model at the end of the unlearning. Nearly all its predictions are the same label, so the
    trigger of this label is empty. The named label is then that of the unlearning, and a clean model has one, too. So
    the default takes the model half-way, which keeps a part of its task (measurements: docs/evaluation/labels.md).
    The success of a trigger is measured only against the target label. The running statistics of batch norms lag behind
    the weights, so they are computed again from the clean images. Sizes differ by orders of magnitude, so the default
    compares their logarithms.

    Triggers and flip rates are those of the unlearned model, so the evidence is of the same kind as that of
    :class:`bdprune.detectors.unlearning.UnlearningDetector`. It takes one model at a time.

    Args:
        search: settings of the search.
        threshold: a larger index is flagged.
        least_spread: smallest MAD, as a difference of logarithms.
        flip_rate: share of held-out images that a flagged trigger must flip in the unlearned model, in [0, 1].
        logarithmic: compare the logarithms of the sizes.
        seed: seed of the unlearning and of the search.
        unlearning: settings of the ascent.
        depth: search on the model at the ``end`` of the unlearning, or ``half_way``. A model without a state half-way
            is searched at the end.
        precision: precision of the ascent (see the detector ``unlearning``).
    """

    search: InvertSettings = _ALL_IMAGES
    threshold: float = 4.0
    least_spread: float = 0.4
    logarithmic: bool = True
    unlearning: UnlearnSettings = SCAN_UNLEARNING
    depth: Literal["half_way", "end"] = "half_way"
    precision: Precision = DEFAULT

    id = "bdprune.nu_neural_cleanse"
    title = "finds a label with an outlying size of its trigger in the unlearned network"
    paper = "Li et al., Reconstructive Neuron Pruning for Backdoor Defense, ICML 2023, arXiv 2305.14876, Appendix D"
    needs = Needs(images="labelled", minimum=100)
    cost = "training"
    sign = "collapse"
    presets = _PRESETS

    @classmethod
    def takes_stacks(cls) -> bool:
        return False

    def __call__(self, case: Case) -> Evidence:
        """Unlearns a copy of the model, and examines it.

        Raises:
            BudgetError: the time does not suffice.
            DataError: there are no clean images, or too few.
            TrainingError: the unlearning had no finite step.
        """
        self.check(case)
        case = case.in_order()
        found = Detector.__call__(self, case.with_model(self.unlearned(case)))
        remark = "The size and the flips are those in the unlearned network."
        return msgspec.structs.replace(found, remarks=(*found.remarks, remark))

    def unlearned(self, case: Case) -> Model:
        """The model that is searched."""
        result = case.get(Unlearning(self.unlearning, self.seed, self.precision, plain=True))
        half_way = result.half_way if self.depth == "half_way" else None
        return with_own_statistics(half_way or result.model, case.images.images)
