"""Suspiciousness pruning (arXiv 2311.07417): prune outlying filters with their batch norm, then fine-tune."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from bdprune.data.clean import CleanData
from bdprune.model.handle import Model
from bdprune.model.prune import PruneMode, prune
from bdprune.purify.base import Purified
from bdprune.scoring.outliers import layer_z_scores
from bdprune.scoring.suspiciousness import Suspiciousness
from bdprune.training.evaluate import clean_accuracy
from bdprune.training.finetune import FineTuneSettings, fine_tune


@dataclass(frozen=True)
class SuspiciousnessPruning:
    """Prunes filters with score > mean + mu std of their layer, together with their norm, then fine-tunes.

    Args:
        score: settings of the score.
        mu: how many standard deviations above its layer's mean a filter may score.
        max_share: largest share of a layer that is pruned; the highest scores go first.
        fine_tuning: settings of the fine-tuning; None for none.
        mode: how a filter is pruned; the paper takes the batch norm with it.
        seed: of the fine-tuning's order and augmentation.
    """

    score: Suspiciousness = field(default_factory=Suspiciousness)
    mu: float = 3.0
    max_share: float = 0.1
    # Small steps, and running statistics however many images there are: batch norms that estimate their statistics anew
    # on a handful of clean images wake the backdoor up again (docs/detection.md).
    fine_tuning: FineTuneSettings | None = field(default_factory=lambda: FineTuneSettings(lr=1e-3, small_data=10_000))
    mode: PruneMode = "zero_gamma_beta"
    seed: int = 0

    id = "bdprune.suspiciousness"

    def __call__(self, model: Model, data: CleanData) -> Purified:
        """Repairs a copy of ``model``. All of ``data`` is used for scoring, fine-tuning and the accuracies reported."""
        clock = [time.perf_counter()]
        scores = self.score(model, data)
        pruned = outlying(scores, self.mu, self.max_share)
        clock.append(time.perf_counter())
        repaired = prune(model, pruned, self.mode)
        if self.fine_tuning:
            repaired = fine_tune(repaired, data, self.fine_tuning, pruned, self.mode, self.seed)
        clock.append(time.perf_counter())
        return Purified(
            model=repaired,
            method=self.id,
            pruned=pruned,
            num_filters=sum(map(len, scores.values())),
            masks=scores,
            threshold=self.mu,
            threshold_rule=f"score > mean + {self.mu:g} std of its layer, at most {self.max_share:.0%} of a layer",
            accuracy_before=clean_accuracy(model.module, data.images, data.labels),
            accuracy_after=clean_accuracy(repaired.module, data.images, data.labels),
            seconds={"score": clock[1] - clock[0], "fine_tune": clock[2] - clock[1]},
            params=asdict(self),
        )


def outlying(scores: Mapping[str, Tensor], mu: float, max_share: float) -> dict[str, list[int]]:
    """Filters more than ``mu`` standard deviations above their layer's mean; groups without one are left out.

    Args:
        scores: group name -> score per filter.
        max_share: largest share of a layer, in [0, 1], rounded down but never below one filter.
    """
    chosen = {}
    for name, z in layer_z_scores(scores).items():
        order = torch.argsort(z, descending=True, stable=True)
        order = order[: max(int(max_share * len(z)), 1)]
        index = sorted(order[z[order] > mu].tolist())
        if index:
            chosen[name] = index
    return chosen
