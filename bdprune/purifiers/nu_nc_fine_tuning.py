"""NU+NC+FT: the trigger comes from the unlearned model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from bdprune.analysis import CLEANSING, SCAN_UNLEARNING, Case, Unlearning, with_own_statistics
from bdprune.loops import InvertSettings, UnlearnSettings
from bdprune.purifiers.nc_fine_tuning import PRESETS as NC_PRESETS
from bdprune.purifiers.nc_fine_tuning import NCFineTuning
from bdprune.record import Needs

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        **NC_PRESETS["paper"],
        "unlearning": UnlearnSettings(stop_accuracy=0.1, stop_on="epoch", small_data=0, retries=0),
        "depth": "end",
    },
    "robust": {},
}


_ALL_IMAGES = replace(CLEANSING, only_right=False)


@dataclass(frozen=True)
class NUNCFineTuning(NCFineTuning):
    """NC+FT with the trigger that the search finds in the unlearned model of the case.

    The network that is fine-tuned is the original one. In the unlearned model a backdoor's trigger is easier to find,
    because the clean task no longer hides it (:class:`bdprune.detectors.nu_neural_cleanse.NUNeuralCleanseDetector`).

    Args:
        search: settings of the search.
        unlearning: settings of the ascent.
        depth: search in the model at the ``end`` of the unlearning, or ``half_way``.
    """

    search: InvertSettings = _ALL_IMAGES
    unlearning: UnlearnSettings = SCAN_UNLEARNING
    depth: Literal["half_way", "end"] = "half_way"

    id = "bdprune.nu_nc_fine_tuning"
    title = "fine-tunes on images with the smallest trigger of the unlearned network and true labels (NU+NC+FT)"
    paper = "Li et al., Reconstructive Neuron Pruning, ICML 2023, arXiv 2305.14876, Table 15"
    needs = Needs(images="labelled", minimum=100)
    presets = PRESETS

    def searched(self, case: Case) -> Case:
        result = case.get(Unlearning(self.unlearning, self.seed, self.precision, plain=True))
        half_way = result.half_way if self.depth == "half_way" else None
        return case.with_model(with_own_statistics(half_way or result.model, case.images.images))
