"""NU+NC+ABL: the target label comes from the unlearned model, and is unlearned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bdprune.loops import FineTuneSettings, TargetAscent, TargetComplement, Trigger, TuningObjective
from bdprune.purifiers.nc_abl import PRESETS as ABL_PRESETS
from bdprune.purifiers.nu_nc_fine_tuning import PRESETS as NU_PRESETS
from bdprune.purifiers.nu_nc_fine_tuning import NUNCFineTuning

PRESETS: Mapping[str, Mapping[str, Any]] = {"paper": {**NU_PRESETS["paper"], **ABL_PRESETS["paper"]}, "robust": {}}


@dataclass(frozen=True)
class NUNCABL(NUNCFineTuning):
    """NC+ABL with the label whose trigger is the smallest in the unlearned model of the case.

    See :class:`bdprune.purifiers.nu_nc_fine_tuning.NUNCFineTuning`.

    Args:
        tuning: settings of the training.
        aim: ``ascent`` raises the cross-entropy with the target, as the paper does; its gradient nearly vanishes while
            the network is sure of the target. ``complement`` lowers -log(1 - p) for the probability p of the target.
        limit: largest cross-entropy of an image with the trigger that ``ascent`` raises further.
    """

    tuning: FineTuneSettings = field(
        default_factory=lambda: FineTuneSettings(lr=0.005, epochs=10, schedule="cosine", clip=1.0)
    )
    aim: Literal["complement", "ascent"] = "complement"
    limit: float = 5.0

    id = "bdprune.nu_nc_abl"
    title = "unlearns the label of the unlearned network on images with a trigger to it (NU+NC+ABL)"
    presets = PRESETS

    def _objective(self, trigger: Trigger) -> TuningObjective:
        if self.aim == "complement":
            return TargetComplement([trigger], self.stamping, self.seed)
        return TargetAscent([trigger], self.stamping, self.seed, self.limit)
