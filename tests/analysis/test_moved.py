"""Filters that unlearning changes most, raised and pruned."""

from __future__ import annotations

import pytest
import torch

from bdprune.analysis import RaisedPoint, easiest_label, moved_filters, raise_moved
from bdprune.model import Model, prune
from bdprune.runtime import clean_accuracy
from bdprune.testing.planted import Planted, planted


@pytest.fixture(scope="module")
def known() -> Planted:
    return planted()


def changed(model: Model, name: str, filter_: int, by: float) -> Model:
    """A copy with one weight of a filter changed."""
    other = model.clone()
    with torch.no_grad():
        other.network.get_parameter(f"{name}.weight")[filter_, 0, 0, 0] += by
    return other


def test_the_change_of_a_filter_is_the_sum_over_its_weights(known: Planted) -> None:
    group = known.clean.groups[1]
    found = moved_filters(known.clean, changed(known.clean, group.conv, 2, -0.5))
    assert found.keys() == {one.name for one in known.clean.groups}
    assert found[group.name][2].item() == pytest.approx(0.5, abs=1e-6)
    assert sum(value.sum().item() for value in found.values()) == pytest.approx(0.5, abs=1e-6)


def test_without_filters_the_network_is_unchanged(known: Planted) -> None:
    data = known.data
    ranked = {group.name: torch.rand(group.num_filters) for group in known.clean.groups}
    first = raise_moved(known.clean, ranked, data, [0])[0]
    assert first.clean_accuracy == pytest.approx(clean_accuracy(known.clean.module, data.images, data.labels))
    assert max(first.flip_rates) < 0.2


def test_the_filters_of_a_backdoor_lead_to_its_target_when_raised(known: Planted) -> None:
    ranked = {group.name: torch.zeros(group.num_filters) for group in known.backdoored.groups}
    for value in ranked.values():
        value[: len(value) // 8] = 1.0  # the planted backdoor uses the first eighth of every layer
    count = sum(int(value.sum()) for value in ranked.values())
    points = raise_moved(known.backdoored, ranked, known.data, [0, count])
    score, label = easiest_label(points, 4.0)
    assert label == known.target and score > 0.5
    pruned = {name: list(range(len(value) // 8)) for name, value in ranked.items()}
    repaired = prune(known.backdoored, pruned, "zero_gamma")
    expected = clean_accuracy(repaired.module, known.data.images, known.data.labels)
    assert points[1].clean_accuracy == pytest.approx(expected)


def test_the_score_weighs_gained_flips_against_lost_accuracy() -> None:
    first = RaisedPoint(0, (0.1, 0.2), 0.8)
    assert easiest_label([first, RaisedPoint(3, (0.1, 0.6), 0.8)], 4.0) == (pytest.approx(0.5), 1)
    assert easiest_label([first, RaisedPoint(3, (0.1, 0.6), 0.72)], 4.0) == (pytest.approx(0.1), 1)
    assert easiest_label([first, RaisedPoint(3, (0.1, 0.6), 0.4)], 4.0) == (0.0, None)
    assert easiest_label([RaisedPoint(0, (0.1, 0.2), 0.0), RaisedPoint(3, (1.0, 0.0), 0.0)], 4.0) == (0.0, None)


def test_a_label_that_all_images_have_already_gains_nothing() -> None:
    assert easiest_label([RaisedPoint(0, (1.0, 0.0), 0.5), RaisedPoint(3, (1.0, 0.0), 0.5)], 4.0) == (0.0, None)
