"""NC+ABL: searches triggers as Neural Cleanse does, and unlearns the target label of images with the smallest one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bdprune.analysis import PUBLISHED_CLEANSING
from bdprune.loops import FineTuneSettings, Stamping, TargetAscent, TargetComplement, Trigger, TuningObjective
from bdprune.purifiers.nc_fine_tuning import NCFineTuning

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "search": PUBLISHED_CLEANSING,
        "stamping": Stamping(share=0.2, jitter=0.0, shift=0),
        "tuning": FineTuneSettings(lr=5e-4, epochs=5),
        "aim": "ascent",
        "max_drop": 1.0,
    },
    "robust": {},
}


@dataclass(frozen=True)
class NCABL(NCFineTuning):
    """Makes the target label unlikely on images with the trigger, and lowers the loss of the other images.

    Anti-Backdoor Learning does so with the poisoned images that it isolates from the training set. A defender without
    that set has none, so RNP's authors stamp the recovered trigger on clean images.

    Args:
        tuning: settings of the training.
        stamping: how the trigger is stamped.
        aim: ``ascent`` raises the cross-entropy with the target, as the paper does; its gradient nearly vanishes while
            the network is sure of the target. ``complement`` lowers -log(1 - p) for the probability p of the target.
        limit: largest cross-entropy of an image with the trigger that ``ascent`` raises further; the loss has no upper
            bound.
    """

    tuning: FineTuneSettings = field(
        default_factory=lambda: FineTuneSettings(lr=0.005, epochs=10, schedule="cosine", clip=1.0)
    )
    aim: Literal["complement", "ascent"] = "complement"
    limit: float = 5.0

    id = "bdprune.nc_abl"
    title = "unlearns the target label of images with the smallest trigger of Neural Cleanse (NC+ABL)"
    paper = "Li et al., Anti-Backdoor Learning, NeurIPS 2021, Equation 4; RNP, arXiv 2305.14876, Table 15"
    presets = PRESETS

    def _objective(self, trigger: Trigger) -> TuningObjective:
        if self.aim == "complement":
            return TargetComplement([trigger], self.stamping, self.seed)
        return TargetAscent([trigger], self.stamping, self.seed, self.limit)
