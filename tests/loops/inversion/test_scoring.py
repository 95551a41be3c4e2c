"""How far a trigger stands out by its size."""

from __future__ import annotations

import math

import pytest

from bdprune.loops import size_score, size_scores


def test_the_score_takes_the_next_and_the_median_size() -> None:
    assert size_score(4.0, [20.0, 30.0]) == pytest.approx((20 * 25) ** 0.5 / 4)


@pytest.mark.parametrize(("size", "others"), [(math.inf, [1.0]), (1.0, []), (math.nan, [1.0])])
def test_without_a_successful_trigger_or_others_it_is_zero(size: float, others: list[float]) -> None:
    assert size_score(size, others) == 0.0


def test_a_trigger_of_size_zero_has_a_finite_score() -> None:
    assert 1e5 < size_score(0.0, [2.0, 3.0]) < math.inf


def test_others_are_those_with_a_target_and_failures_count_with_the_largest_size() -> None:
    scores = size_scores([4.0, 20.0, math.inf, 5.0], [True, True, True, False], most=30.0)
    assert scores[0] == pytest.approx((20 * 25) ** 0.5 / 4) and scores[2] == 0.0
    assert scores[3] == pytest.approx((4 * 20) ** 0.5 / 5)
