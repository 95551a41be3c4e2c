"""Detects filters with an outlying channel Lipschitz score in their layer (CLP's statistic); data-free."""

from __future__ import annotations

from dataclasses import dataclass

from bdprune.analysis import Case, Lipschitz
from bdprune.methods import Detector, Steps
from bdprune.record import Needs, Rule


@dataclass(frozen=True)
class LipschitzDetector(Detector):
    """Flags a model if the channel Lipschitz score of a filter is far above the others of its layer.

    Args:
        threshold: largest z-score within a layer that is not flagged (measurements: docs/evaluation/detection.md).
    """

    threshold: float = 6.0

    id = "bdprune.lipschitz"
    title = "finds a filter with an outlying spectral norm in its layer"
    paper = "Zheng et al., Data-free Backdoor Removal based on Channel Lipschitzness, ECCV 2022, arXiv 2208.03111"
    needs = Needs(images="none", minimum=0)
    cost = "weights"
    sign = "filters"
    level = "fast"
    limits = "It finds backdoors in a single strong filter. Most are spread over several and stay below its threshold."
    rule = Rule(
        id="BD020",
        name="outlying-filter",
        help="A filter responds far more strongly than the others of its layer, as filters of a trigger do.",
    )

    def steps(self, case: Case) -> Steps:
        """Scores the weights; ignores clean images."""
        scores = yield Lipschitz()
        return self.outlier_evidence(case, scores, self.threshold)
