"""Detects filters with an outlying suspiciousness score in their layer (arXiv 2311.07417)."""

from __future__ import annotations

from dataclasses import dataclass, field

from bdprune.analysis import Case, Suspiciousness
from bdprune.methods import Detector
from bdprune.record import Evidence, Needs, Rule


@dataclass(frozen=True)
class SuspiciousnessDetector(Detector):
    """Flags a model if the suspiciousness score of a filter is far above the others of its layer.

    Args:
        score: settings of the score.
        threshold: largest z-score within a layer that is not flagged (measurements: docs/evaluation/detection.md).
        max_images: number of clean images to use, the same number of every class (at least one).
        seed: seed for choosing them.
    """

    score: Suspiciousness = field(default_factory=Suspiciousness)
    threshold: float = 8.0
    max_images: int = 100
    seed: int = 0

    id = "bdprune.suspiciousness"
    title = "finds a strong filter that is uncorrelated and inactive on clean images"
    paper = "arXiv 2311.07417"
    needs = Needs(images="labelled")
    cost = "forward"
    sign = "filters"
    level = "fast"
    limits = "Its high threshold avoids false alarms on clean networks, but it also misses most backdoored ones."
    rule = Rule(
        id="BD020",
        name="outlying-filter",
        help="A filter responds far more strongly than the others of its layer, as filters of a trigger do.",
    )

    def work(self, case: Case) -> float:
        """The statistics of the filters take about as long as the forward passes themselves."""
        classes = case.model.num_classes
        return 2.0 * min(max(self.max_images // classes, 1) * classes, len(case.images))

    def __call__(self, case: Case) -> Evidence:
        """Scores the filters on a few of the clean images.

        Raises:
            DataError: there are no clean images.
        """
        self.check(case)
        few = case.sample(self.max_images, self.seed)
        return self.outlier_evidence(case, few.get(self.score), self.threshold)
