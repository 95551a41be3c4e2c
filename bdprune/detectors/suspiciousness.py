"""Filters whose suspiciousness score stands far out of their layer (arXiv 2311.07417)."""

from __future__ import annotations

from dataclasses import dataclass, field

from bdprune.analysis import Case, Suspiciousness
from bdprune.methods import Detector
from bdprune.record import Evidence, Needs, Rule


@dataclass(frozen=True)
class SuspiciousnessDetector(Detector):
    """Flags a model with a filter whose suspiciousness score is far above its layer's.

    Args:
        score: settings of the score.
        threshold: largest z-score within a layer that passes (docs/evaluation/detection.md has the measurements).
        max_images: clean images to use, the same number of every class (at least one).
        seed: of that draw.
    """

    score: Suspiciousness = field(default_factory=Suspiciousness)
    threshold: float = 8.0
    max_images: int = 100
    seed: int = 0

    id = "bdprune.suspiciousness"
    title = "a filter that is loud, lonely and idle on clean images"
    paper = "arXiv 2311.07417"
    needs = Needs(images="labelled")
    cost = "forward"
    limits = "It is silent on clean networks by its high threshold, and on most backdoored ones too."
    rule = Rule(
        id="BD020",
        name="outlying-filter",
        help="A filter answers far more strongly than the others of its layer, as filters that carry a trigger do.",
    )

    def __call__(self, case: Case) -> Evidence:
        """Scores the filters on a few of the clean images.

        Raises:
            DataError: no clean images.
        """
        self.check(case)
        few = case.sample(self.max_images, self.seed)
        return self.outlier_evidence(case, few.get(self.score), self.threshold)
