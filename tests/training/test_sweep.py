from typing import Any

import pytest
import torch

from bdprune.model.prune import prune
from bdprune.training.evaluate import clean_accuracy
from bdprune.training.sweep import below, sweep_thresholds


def ladder(bright: Any) -> dict[str, torch.Tensor]:
    """Masks 0, 0.1, ... on the last group: every threshold step prunes one filter more."""
    return {"0": torch.ones(12), "3": torch.arange(12) / 10}


THRESHOLDS = [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]


def test_below_takes_the_threshold_itself() -> None:
    masks = {"a": torch.tensor([0.0, 0.2, 0.5]), "b": torch.tensor([0.9])}
    assert below(masks, 0.2) == {"a": [0, 1]}
    assert below(masks, 0.0) == {"a": [0]}
    assert below(masks, 1.0) == {"a": [0, 1, 2], "b": [0]}


def test_points_are_what_pruning_gives_and_the_choice_keeps_the_promise(bright: Any) -> None:
    images, labels = bright.data.images, bright.data.labels
    sweep = sweep_thresholds(bright.model, ladder(bright), [bright.data], THRESHOLDS, 0.02, "zero_gamma")
    for point in sweep.points:
        assert point.filters_pruned == round(point.threshold * 10 + 0.5)
        expected = clean_accuracy(prune(bright.model, point.pruned).module, images, labels)
        assert point.clean_accuracy == pytest.approx(expected)
    *kept, last = sweep.points
    assert all(sweep.accuracy_before - point.clean_accuracy <= 0.02 for point in kept)
    assert sweep.accuracy_before - last.clean_accuracy > 0.02
    assert sweep.highest(0.02) == (kept[-1] if kept else None)


def test_any_drop_allowed_goes_to_the_end(bright: Any) -> None:
    sweep = sweep_thresholds(bright.model, ladder(bright), [bright.data], THRESHOLDS, 1.0, "zero_gamma")
    chosen = sweep.highest(1.0)
    assert chosen is not None
    assert chosen.threshold == 0.95


def test_no_drop_allowed_may_choose_nothing(bright: Any) -> None:
    masks = {"0": torch.zeros(12), "3": torch.zeros(12)}
    sweep = sweep_thresholds(bright.model, masks, [bright.data], [0.0, 0.5], 0.02, "zero_gamma_beta")
    assert sweep.highest(0.02) is None
    assert len(sweep.points) == 1


def test_looking_at_all_thresholds_takes_the_highest_that_keeps_the_promise(bright: Any) -> None:
    sweep = sweep_thresholds(bright.model, ladder(bright), [bright.data], THRESHOLDS, 0.02, "zero_gamma", False)
    assert [point.threshold for point in sweep.points] == THRESHOLDS
    kept = [point for point in sweep.points if sweep.accuracy_before - point.clean_accuracy <= 0.02]
    assert sweep.highest(0.02) == (kept[-1] if kept else None)


def test_the_largest_drop_of_all_sets_counts(bright: Any) -> None:
    one, two = bright.data.subset(bright.data.labels == 0), bright.data.subset(bright.data.labels == 1)
    swept = [
        sweep_thresholds(bright.model, ladder(bright), sets, THRESHOLDS, 0.02, "zero_gamma", False)
        for sets in ([one], [two], [one, two])
    ]
    drops = [[point.drop for point in sweep.points] for sweep in swept]
    assert drops[2] == [max(pair) for pair in zip(drops[0], drops[1], strict=True)]
    assert drops[0] != drops[1]
    assert [point.clean_accuracy for point in swept[2].points] == [point.clean_accuracy for point in swept[0].points]


def test_hopeless_points_are_measured_on_the_first_set_alone(bright: Any) -> None:
    one, two = bright.data.subset(bright.data.labels == 0), bright.data.subset(bright.data.labels == 1)
    args = (bright.model, ladder(bright), [one, two], THRESHOLDS, 0.02, "zero_gamma", False)
    whole, cut = sweep_thresholds(*args), sweep_thresholds(*args, hopeless=0.1)
    alone = sweep_thresholds(*args[:2], [one], *args[3:])
    for full, short, first in zip(whole.points, cut.points, alone.points, strict=True):
        assert short.clean_accuracy == full.clean_accuracy
        assert short.drop == (first.drop if first.drop > 0.1 else full.drop)
    assert any(point.drop > 0.1 for point in alone.points)
