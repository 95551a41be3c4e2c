"""Fine-Pruning ranked on the unlearned network (RNP, Appendix D: NU+FP)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from bdprune.analysis import SCAN_UNLEARNING, Case, Unlearning, with_own_statistics
from bdprune.loops import UnlearnSettings
from bdprune.model import FilterGroup
from bdprune.purifiers.fine_pruning import FinePruning, mean_activations

_PUBLISHED = UnlearnSettings(
    momentum=0.9, weight_decay=5e-2, stop_accuracy=0.1, stop_on="epoch", small_data=0, retries=0
)


@dataclass(frozen=True)
class NUFinePruning(FinePruning):
    """Prunes the channels of the last conv that unlearning has raised most, and fine-tunes the rest.

    RNP says only that fine-pruning runs on the unlearned network, which exposes the backdoor. Fine-pruning takes the
    channels that sleep on clean images for those of the backdoor. In the unlearned network it is the other way round:
    it has forgotten the clean task and predicts the backdoor's label for clean images, so the channels that still
    respond, or respond more, are those of the backdoor. So this method ranks the channels by the rise of their mean
    activation on clean images from the given network to the unlearned one, in units of the mean activation of the
    layer, and prunes those that rise most; this ranking is our own. It prunes the given network, not the unlearned one,
    which has lost the clean task. The limits on accuracy and the fine-tuning are those of fine-pruning.

    Args:
        prune_drop: see :class:`bdprune.purifiers.fine_pruning.FinePruning`, as all arguments that are not listed here.
        unlearning: settings of the ascent.
        depth: rank on the network at the ``end`` of the unlearning, or ``half_way``. A network without a state half-way
            is ranked at the end.
    """

    unlearning: UnlearnSettings = field(default_factory=lambda: SCAN_UNLEARNING)
    depth: Literal["half_way", "end"] = "half_way"

    chosen: ClassVar[str] = "most raised"

    id = "bdprune.nu_fine_pruning"
    title = "prunes the channels of the last conv that unlearning raises most, then fine-tunes"
    paper = "Li et al., Reconstructive Neuron Pruning for Backdoor Defense, ICML 2023, arXiv 2305.14876, Appendix D"
    limits = "It leaves backdoors that are not in the last conv."
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"least_accuracy": 0.8, "regained_drop": 1.0, "unlearning": _PUBLISHED, "depth": "end"},
        "robust": {},
    }

    def _scores(self, case: Case, rest: Case, group: FilterGroup) -> Tensor:
        images = rest.images.images
        found = rest.get(Unlearning(self.unlearning, self.seed, self.precision))
        half_way = found.half_way if self.depth == "half_way" else None
        unlearned = with_own_statistics(half_way or found.model, images)
        before, after = (mean_activations(model, images, group) for model in (case.model, unlearned))
        return before / before.mean().clamp(min=1e-12) - after / after.mean().clamp(min=1e-12)
