"""Filters whose suspiciousness score stands far out of their layer (arXiv 2311.07417)."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field

import torch

from bdprune.analysis import Suspiciousness
from bdprune.data import CleanData
from bdprune.errors import DataError
from bdprune.methods import Evidence, outlier_evidence
from bdprune.model import Model


@dataclass(frozen=True)
class SuspiciousnessDetector:
    """Flags a model with a filter whose suspiciousness score is far above its layer's.

    Args:
        score: settings of the score.
        threshold: largest z-score within a layer that passes (docs/detection.md has the measurements).
        max_images: clean images to use, the same number of every class (at least one).
        seed: of that draw.
    """

    score: Suspiciousness = field(default_factory=Suspiciousness)
    threshold: float = 8.0
    max_images: int = 100
    seed: int = 0

    id = "bdprune.suspiciousness"
    needs_data = True

    def __call__(self, model: Model, data: CleanData | None) -> Evidence:
        """Scores the filters on ``data``.

        Raises:
            DataError: no data.
        """
        if data is None:
            raise DataError("The suspiciousness detector needs clean images.", "Pass some with --data.")
        start = time.perf_counter()
        per_class = max(self.max_images // model.num_classes, 1)
        few = data.sample(per_class, torch.Generator().manual_seed(self.seed))
        return outlier_evidence(self.id, self.score(model, few), self.threshold, start, asdict(self.score))
