"""Filters whose channel Lipschitz score stands far out of their layer (CLP's statistic): data-free."""

from __future__ import annotations

from dataclasses import dataclass

from bdprune.analysis import Case, Lipschitz
from bdprune.methods import Detector, Steps
from bdprune.record import Needs, Rule


@dataclass(frozen=True)
class LipschitzDetector(Detector):
    """Flags a model with a filter whose channel Lipschitz score is far above its layer's.

    Args:
        threshold: largest z-score within a layer that passes (docs/evaluation/detection.md has the measurements).
    """

    threshold: float = 6.0

    id = "bdprune.lipschitz"
    title = "a filter whose spectral norm stands out of its layer"
    paper = "Zheng et al., Data-free Backdoor Removal based on Channel Lipschitzness, ECCV 2022, arXiv 2208.03111"
    needs = Needs(images="none", minimum=0)
    cost = "weights"
    limits = "It sees backdoors that sit in one loud filter; most are spread over several and stay below its threshold."
    rule = Rule(
        id="BD020",
        name="outlying-filter",
        help="A filter answers far more strongly than the others of its layer, as filters that carry a trigger do.",
    )

    def steps(self, case: Case) -> Steps:
        """Scores the weights; clean images are not looked at."""
        scores = yield Lipschitz()
        return self.outlier_evidence(case, scores, self.threshold)
