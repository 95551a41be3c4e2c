"""The fit of a logistic model, and the measures of its probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from bdprune.verdict.fitting import auroc, calibration_error, cross_entropy, fit_logistic, interval, upper_bound


def test_the_fit_recovers_the_weights_of_its_data() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20_000, 2, generator=generator)
    odds = inputs @ torch.tensor([1.5, -0.5]) + 0.7
    truth = (torch.rand(len(odds), generator=generator) < odds.sigmoid()).long()
    weights, bias = fit_logistic(inputs, truth, ridge=0.0)
    assert weights.tolist() == pytest.approx([1.5, -0.5], abs=0.1) and bias == pytest.approx(0.7, abs=0.1)


def test_the_penalty_keeps_weights_finite_if_the_kinds_are_separable() -> None:
    weights, _ = fit_logistic(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]))
    assert 0 < weights[0] < 2


def test_the_fit_needs_both_kinds() -> None:
    with pytest.raises(ValueError, match="both kinds"):
        fit_logistic(torch.zeros(3, 1), torch.ones(3))


def test_auroc_counts_ties_half() -> None:
    assert auroc([3.0, 1.0, 1.0, 0.0], [True, True, False, False]) == pytest.approx(3.5 / 4)
    assert math.isnan(auroc([1.0], [True]))


def test_measures_of_perfect_and_of_useless_probabilities() -> None:
    truth = [True, False, True, False]
    assert cross_entropy([1.0, 0.0, 1.0, 0.0], truth) < 1e-5
    assert cross_entropy([0.5] * 4, truth) == pytest.approx(math.log(2))
    assert calibration_error([0.5] * 4, truth) == 0.0
    assert calibration_error([1.0] * 4, truth) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("hits", "count", "bound"), [(0, 58, 0.0503), (0, 10, 0.2589), (1, 20, 0.2161), (5, 5, 1.0), (1000, 2100, 0.4944)]
)
def test_the_exact_upper_bound(hits: int, count: int, bound: float) -> None:
    assert upper_bound(hits, count) == pytest.approx(bound, abs=1e-4)


def test_a_bootstrap_interval_holds_the_mean() -> None:
    values = [0.0, 1.0] * 50
    low, high = interval(lambda places: sum(values[place] for place in places) / len(places), 100)
    assert 0.35 < low < 0.5 < high < 0.65
    assert all(map(math.isnan, interval(lambda places: math.nan, 3, draws=5)))
