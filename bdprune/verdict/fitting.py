"""Fits a logistic model, and measures how good its probabilities are."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_NEWTON_STEPS = 50
_ENOUGH = 1e-10


def fit_logistic(inputs: Tensor, truth: Tensor, ridge: float = 1.0) -> tuple[Tensor, float]:
    """Weights ``[D]`` and bias of a logistic model, by Newton's method.

    Args:
        inputs: ``[N, D]``, standardised.
        truth: ``[N]``, 1 for backdoored.
        ridge: L2 penalty on the weights; the bias has none.

    Raises:
        ValueError: all networks are of one kind.
    """
    if not 0 < truth.sum() < len(truth):
        raise ValueError("a logistic model needs networks of both kinds")
    design = torch.cat([inputs.double(), torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    penalty = torch.full((design.shape[1],), ridge, dtype=torch.float64)
    penalty[-1] = 1e-6
    weights = torch.zeros(design.shape[1], dtype=torch.float64)
    for _ in range(_NEWTON_STEPS):
        probability = (design @ weights).sigmoid()
        gradient = design.T @ (probability - truth.double()) + penalty * weights
        curvature = design.T @ (design * (probability * (1 - probability))[:, None]) + penalty.diag()
        step = torch.linalg.solve(curvature, gradient)
        weights = weights - step
        if step.abs().max() < _ENOUGH:
            break
    return weights[:-1], float(weights[-1])


def auroc(scores: Sequence[float], truth: Sequence[bool]) -> float:
    """Probability that a backdoored network has a larger score than a clean one; ties count half."""
    higher, lower = ([one for one, bad in zip(scores, truth, strict=True) if bad is kind] for kind in (True, False))
    lower.sort()
    wins = sum(bisect_left(lower, one) + bisect_right(lower, one) for one in higher) / 2
    return wins / (len(higher) * len(lower)) if higher and lower else math.nan


def cross_entropy(probabilities: Sequence[float], truth: Sequence[bool]) -> float:
    """Mean negative log-likelihood in nats; probabilities are kept 1e-6 away from 0 and 1."""
    kept = [min(max(one, 1e-6), 1 - 1e-6) for one in probabilities]
    return -sum(math.log(one if bad else 1 - one) for one, bad in zip(kept, truth, strict=True)) / len(kept)


def calibration_error(probabilities: Sequence[float], truth: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error: mean distance of the mean probability of a bin from its share of backdoored ones.

    The bins have equal width, and each counts with its number of networks.
    """
    total = 0.0
    for number in range(bins):
        own = [
            (one, bad)
            for one, bad in zip(probabilities, truth, strict=True)
            if min(int(one * bins), bins - 1) == number
        ]
        if own:
            total += abs(sum(one for one, _ in own) - sum(bad for _, bad in own))
    return total / len(probabilities)


def upper_bound(hits: int, count: int, confidence: float = 0.95) -> float:
    """The exact (Clopper-Pearson) one-sided upper bound of a rate of which ``hits`` of ``count`` were seen."""
    if hits >= count:
        return 1.0
    low, high = hits / count, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        below = sum(math.exp(_log_binomial(one, count, middle)) for one in range(hits + 1))
        low, high = (middle, high) if below > 1 - confidence else (low, middle)
    return high


def _log_binomial(hits: int, count: int, rate: float) -> float:
    """Logarithm of the probability of ``hits`` of ``count`` at this rate in (0, 1)."""
    ways = math.lgamma(count + 1) - math.lgamma(hits + 1) - math.lgamma(count - hits + 1)
    return ways + hits * math.log(rate) + (count - hits) * math.log1p(-rate)


def interval(
    measure: Callable[[Sequence[int]], float], count: int, draws: int = 1000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval of a measure.

    Args:
        measure: of the networks at these positions.
        count: number of networks.
        draws: number of resamplings with replacement; those without a finite measure do not count.
        seed: of the resamplings.
        confidence: share of the resamplings inside.

    Returns:
        (lower, upper); NaN if no resampling has a finite measure.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [measure(torch.randint(count, (count,), generator=generator).tolist()) for _ in range(draws)]
    values = torch.tensor([one for one in drawn if math.isfinite(one)], dtype=torch.float64)
    if not len(values):
        return math.nan, math.nan
    edge = (1 - confidence) / 2
    low, high = values.quantile(torch.tensor([edge, 1 - edge], dtype=torch.float64)).tolist()
    return low, high
