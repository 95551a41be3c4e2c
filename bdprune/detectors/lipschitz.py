"""Filters whose channel Lipschitz score stands far out of their layer (CLP's statistic): data-free."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from bdprune.analysis import channel_lipschitz, channel_lipschitz_of
from bdprune.data import CleanData
from bdprune.methods import Evidence, outlier_evidence
from bdprune.model import Model


@dataclass(frozen=True)
class LipschitzDetector:
    """Flags a model with a filter whose channel Lipschitz score is far above its layer's.

    Args:
        threshold: largest z-score within a layer that passes (docs/detection.md has the measurements).
    """

    threshold: float = 6.0

    id = "bdprune.lipschitz"
    needs_data = False
    batch_size = 0

    def __call__(self, model: Model, data: CleanData | None = None) -> Evidence:
        """Scores the weights; ``data`` is not looked at."""
        start = time.perf_counter()
        return outlier_evidence(self.id, channel_lipschitz(model), self.threshold, start, {})

    def together(self, models: Sequence[Model], data: CleanData | None = None) -> list[Evidence]:
        """The filters of all models in one call."""
        start = time.perf_counter()
        scores = channel_lipschitz_of(models)
        # Each is told its share of the call, and its own time beside it.
        share = (time.perf_counter() - start) / len(models)
        return [outlier_evidence(self.id, one, self.threshold, time.perf_counter() - share, {}) for one in scores]
