"""NU+NC+FT: the label of the trigger comes from the unlearned model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from bdprune.analysis import CLEANSING, SCAN_UNLEARNING, Case, Unlearning, with_own_statistics
from bdprune.loops import InvertSettings, Trigger, UnlearnSettings
from bdprune.purifiers.nc_fine_tuning import PRESETS as NC_PRESETS
from bdprune.purifiers.nc_fine_tuning import NCFineTuning
from bdprune.record import Needs

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        **NC_PRESETS["paper"],
        "unlearning": UnlearnSettings(stop_accuracy=0.1, stop_on="epoch", small_data=0, retries=0),
        "depth": "end",
        "trigger_of": "unlearned",
    },
    "robust": {},
}


_ALL_IMAGES = replace(CLEANSING, only_right=False)


@dataclass(frozen=True)
class NUNCFineTuning(NCFineTuning):
    """NC+FT with the label whose trigger is the smallest in the unlearned model of the case.

    The network that is fine-tuned is the given one. In the unlearned model the label of a backdoor is easier to find,
    because the clean task no longer hides it (:class:`bdprune.detectors.nu_neural_cleanse.NUNeuralCleanseDetector`).
    That model leans towards this label by itself, so a trigger that suffices there flips few images in the given
    network. So triggers are searched in the given network too, and the one to that label is used.

    The preset ``paper`` takes the trigger of the unlearned model itself.

    Args:
        search: settings of the search.
        unlearning: settings of the ascent.
        depth: search in the model at the ``end`` of the unlearning, or ``half_way``.
        trigger_of: fine-tune with the trigger of the ``given`` network, or of the ``unlearned`` one.
    """

    search: InvertSettings = _ALL_IMAGES
    unlearning: UnlearnSettings = SCAN_UNLEARNING
    depth: Literal["half_way", "end"] = "half_way"
    trigger_of: Literal["given", "unlearned"] = "given"

    id = "bdprune.nu_nc_fine_tuning"
    title = "fine-tunes on images with a trigger to the label of the unlearned network, with true labels (NU+NC+FT)"
    paper = "Li et al., Reconstructive Neuron Pruning, ICML 2023, arXiv 2305.14876, Table 15"
    needs = Needs(images="labelled", minimum=100)
    presets = PRESETS

    def unlearned(self, case: Case) -> Case:
        """The case with the unlearned model in place of its own."""
        result = case.get(Unlearning(self.unlearning, self.seed, self.precision, plain=True))
        half_way = result.half_way if self.depth == "half_way" else None
        return case.with_model(with_own_statistics(half_way or result.model, case.images.images))

    def smallest_trigger(self, case: Case) -> Trigger | None:
        found = super().smallest_trigger(self.unlearned(case))
        if found is None or self.trigger_of == "unlearned":
            return found
        given = self.recoveries(case, replace(self.search, only_right=True))
        own = [one for one in given if one.trigger.target == found.target and math.isfinite(one.size)]
        return own[0].trigger if own else found
