"""Filters whose channel Lipschitz score stands far out of their layer (CLP's statistic): data-free."""

from __future__ import annotations

import time
from dataclasses import dataclass

from bdprune.data.clean import CleanData
from bdprune.detect.base import Evidence
from bdprune.detect.outliers import outlier_evidence
from bdprune.model.handle import Model
from bdprune.scoring.lipschitz import channel_lipschitz


@dataclass(frozen=True)
class LipschitzDetector:
    """Flags a model with a filter whose channel Lipschitz score is far above its layer's.

    Args:
        threshold: largest z-score within a layer that passes (docs/detection.md has the measurements).
    """

    threshold: float = 6.0

    id = "bdprune.lipschitz"
    needs_data = False

    def __call__(self, model: Model, data: CleanData | None = None) -> Evidence:
        """Scores the weights; ``data`` is not looked at."""
        start = time.perf_counter()
        return outlier_evidence(self.id, channel_lipschitz(model), self.threshold, start, {})
