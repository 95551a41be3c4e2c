"""Filters that a trigger raises, and pruning them."""

from __future__ import annotations

import pytest
import torch

from bdprune.analysis import PrunedPoint, natural_share, prune_raised, raised_filters, selectivity
from bdprune.loops import Trigger
from bdprune.testing.planted import Planted, planted


@pytest.fixture(scope="module")
def known() -> Planted:
    return planted()


@pytest.fixture(scope="module")
def trigger(known: Planted) -> Trigger:
    """The true trigger: tests may know it."""
    empty, full = (known.trigger(torch.full((1, 3, 16, 16), value)) for value in (0.0, 1.0))
    mask = (empty == full).all(1).float()
    return Trigger(mask, empty[0].clamp(0, 1), target=known.target)


def test_the_true_trigger_raises_the_filters_of_the_backdoor(known: Planted, trigger: Trigger) -> None:
    ranked = raised_filters(known.backdoored, trigger, known.data.images)
    assert ranked.keys() == {group.name for group in known.backdoored.groups}
    for name, value in ranked.items():
        spare = len(value) // 8  # the planted backdoor uses the first eighth of every layer
        if name.endswith("body.2.0"):
            assert value[:spare].max() > value[spare:].max()


def test_pruning_them_ends_the_flips_and_keeps_the_accuracy(known: Planted, trigger: Trigger) -> None:
    ranked = raised_filters(known.backdoored, trigger, known.data.images)
    points = prune_raised(known.backdoored, trigger, ranked, known.data, [0, 8, 24])
    assert points[0].flip_rate > 0.9 and points[-1].flip_rate < 0.3
    assert points[0].clean_accuracy - points[-1].clean_accuracy < 0.05


def test_the_score_weighs_lost_flips_against_lost_accuracy() -> None:
    free = [PrunedPoint(0, 0.8, 1.0), PrunedPoint(2, 0.8, 0.5), PrunedPoint(4, 0.4, 0.0)]
    assert selectivity(free, 10.0) == 0.5
    assert selectivity([PrunedPoint(0, 0.8, 1.0), PrunedPoint(4, 0.72, 0.0)], 10.0) == pytest.approx(0.0)
    assert selectivity([PrunedPoint(0, 0.8, 0.0)], 10.0) == 0.0


def test_a_picture_of_the_label_raises_its_own_filters(known: Planted, trigger: Trigger) -> None:
    label = 5
    natural = Trigger(torch.full((1, 16, 16), 0.8), known.data.images[known.data.labels == label].mean(0), label)
    ranked = raised_filters(known.backdoored, natural, known.data.images)
    of_planted = raised_filters(known.backdoored, trigger, known.data.images)
    share = natural_share(known.backdoored, ranked, known.data, label)
    assert share > natural_share(known.backdoored, of_planted, known.data, known.target)


def test_without_images_of_the_label_nothing_is_natural(known: Planted, trigger: Trigger) -> None:
    ranked = raised_filters(known.backdoored, trigger, known.data.images[:20])
    others = known.data.subset((known.data.labels != known.target).nonzero().flatten())
    assert natural_share(known.backdoored, ranked, others, known.target) == 0.0
