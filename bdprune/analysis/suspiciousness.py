"""The suspiciousness score of arXiv 2311.07417, as reconstructed: a clean-data coefficient times a spectral norm.

The paper's equations are not public. The sign and the root of each factor are settings here; a study on models of known
truth chose the defaults (docs/evaluation/suspiciousness-study.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bdprune.analysis.case import Analysis, Case
from bdprune.analysis.lipschitz import Lipschitz
from bdprune.analysis.statistics import FilterStatistics, Statistics
from bdprune.data import CleanData
from bdprune.model import Model

_ETA = 1e-6
_DEAD = 1e-3  # A filter this far below its layer's median spectral norm has no effect on the output.


@dataclass(frozen=True)
class Suspiciousness(Analysis[dict[str, Tensor]]):
    """``S_k = root(g_k^s (1 - r_k)^c a_k^t) sigma_k``, each factor relative to its layer's mean.

    g is the saliency, r the mean absolute correlation with the layer's other filters, a the activation norm and
    sigma the spectral norm times the gain of the norm that follows. An exponent of 0 omits its factor.

    Args:
        saliency: exponent of g: 1 if large gradients are suspicious, -1 if small ones are.
        correlation: exponent of 1 - r: 1 if uncorrelated filters are suspicious, -1 if correlated ones are.
        activation: exponent of a: -1 if filters dormant on clean images are suspicious, 1 if active ones are.
        spectral: exponent of sigma: 1 or 0.
        root: argument of the square root: ``coefficient`` (everything except sigma), ``spectral`` or ``none``.
        per_image: saliency as the mean of per-image gradient norms; otherwise the norm of the mean gradient.
        order: 1 or 2: norm of the gradient.
        rectified: activations and correlations after a ReLU.
    """

    saliency: int = 0
    correlation: int = 1
    activation: int = -1
    spectral: int = 1
    root: str = "coefficient"
    per_image: bool = True
    order: int = 1
    rectified: bool = True

    def compute(self, case: Case) -> dict[str, Tensor]:
        """Group name -> score per filter ``[num_filters]``, float64, CPU; larger is more suspicious."""
        wanted = Statistics(self.saliency != 0, self.per_image, self.order, self.rectified)
        return self.combine(case.get(wanted), case.get(Lipschitz()))

    def __call__(self, model: Model, data: CleanData) -> dict[str, Tensor]:
        """The score of a single model."""
        return Case(model, data).get(self)

    def combine(self, statistics: Mapping[str, FilterStatistics], sigma: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The score from its parts, for callers that already have them."""
        return {name: self._score(statistics[name], sigma[name].double()) for name in statistics}

    def _score(self, statistics: FilterStatistics, sigma: Tensor) -> Tensor:
        coefficient = (
            (_relative(statistics.saliency) + _ETA) ** self.saliency
            * (1 - statistics.correlation + _ETA) ** self.correlation
            * (_relative(statistics.activation) + _ETA) ** self.activation
        )
        if self.root == "coefficient":
            coefficient = coefficient.sqrt()
        gain = sigma.sqrt() if self.root == "spectral" else sigma
        score = coefficient * gain**self.spectral
        return torch.where(sigma > _DEAD * sigma.median(), score, 0.0)


def _relative(factor: Tensor) -> Tensor:
    mean = factor.mean()
    return factor / mean if mean > 0 else torch.zeros_like(factor)
