from typing import Any

import pytest
import torch

from bdprune.analysis.statistics import FilterStatistics
from bdprune.analysis.suspiciousness import Suspiciousness

STATISTICS = {
    "a": FilterStatistics(
        saliency=torch.tensor([1.0, 3, 2]).double(),
        activation=torch.tensor([4.0, 1, 1]).double(),
        correlation=torch.tensor([0.5, 0.0, 0.75]).double(),
    )
}
SIGMA = {"a": torch.tensor([2.0, 4, 9])}


def combine(**settings: Any) -> list[float]:
    return Suspiciousness(**settings).combine(STATISTICS, SIGMA)["a"].tolist()  # type: ignore[no-any-return]


def test_every_factor_alone() -> None:
    off = {"saliency": 0, "correlation": 0, "activation": 0, "spectral": 0, "root": "none"}
    assert combine(**off) == pytest.approx([1, 1, 1])
    assert combine(**off | {"saliency": 1}) == pytest.approx([0.5, 1.5, 1], rel=1e-5)
    assert combine(**off | {"saliency": -1}) == pytest.approx([2, 1 / 1.5, 1], rel=1e-5)
    assert combine(**off | {"correlation": 1}) == pytest.approx([0.5, 1, 0.25], rel=1e-5)
    assert combine(**off | {"activation": -1}) == pytest.approx([0.5, 2, 2], rel=1e-5)
    assert combine(**off | {"spectral": 1}) == pytest.approx([2, 4, 9])


def test_roots() -> None:
    settings = {"saliency": 1, "correlation": 1, "activation": -1, "spectral": 1}
    coefficient = [0.5 * 0.5 / 2, 1.5 * 1 * 2, 1 * 0.25 * 2]
    sigma = [2, 4, 9]
    plain = [c * s for c, s in zip(coefficient, sigma, strict=True)]
    assert combine(root="none", **settings) == pytest.approx(plain, rel=1e-4)
    on_coefficient = [c**0.5 * s for c, s in zip(coefficient, sigma, strict=True)]
    assert combine(root="coefficient", **settings) == pytest.approx(on_coefficient, rel=1e-4)
    on_sigma = [c * s**0.5 for c, s in zip(coefficient, sigma, strict=True)]
    assert combine(root="spectral", **settings) == pytest.approx(on_sigma, rel=1e-4)


def test_dead_filters_score_zero() -> None:
    dead = {"a": torch.tensor([1e-5, 4, 9])}
    scores = Suspiciousness().combine(STATISTICS, dead)["a"]
    assert scores[0] == 0
    assert (scores[1:] > 0).all()


def test_scores_of_a_real_network_are_finite_and_reproducible(bright: Any) -> None:
    few = bright.data.subset(torch.arange(30))
    one, two = (Suspiciousness()(bright.model, few) for _ in range(2))
    assert list(one) == ["0", "3"]
    assert all(torch.isfinite(score).all() and len(score) == 12 for score in one.values())
    assert all(torch.equal(one[name], two[name]) for name in one)
