"""The threshold sweep of one model and of several, in every variant, compared with plain pruning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import bdprune
from bdprune.loops import predictions, sweeping
from bdprune.loops.predictions import PrunedPredictions, StackedPredictions
from bdprune.loops.sweeping import SweepSettings, below, sweep, sweep_stack, sweep_variant
from bdprune.model.edit.pruning import MODES, PruneMode, prune
from bdprune.model.handle import Model, Normalization
from bdprune.ops import Choice, kept_choices
from bdprune.runtime.evaluate import clean_accuracy
from bdprune.runtime.memory import weight_bytes

from ..helpers import siblings

pytestmark = pytest.mark.usefixtures("exact")


def rising(bright: Any) -> dict[str, torch.Tensor]:
    """Masks 0, 0.1, ... on the last group: every threshold step prunes one filter more."""
    return {"0": torch.ones(12), "3": torch.arange(12) / 10}


def steps_of(bright: Any) -> list[dict[str, list[int]]]:
    """The prunings of a sweep over those masks."""
    return [below(rising(bright), threshold) for threshold in (-1.0, *THRESHOLDS)]


THRESHOLDS = [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]
ALL = SweepSettings(THRESHOLDS, 0.02, stop_early=False)


def test_filters_at_the_threshold_are_pruned() -> None:
    masks = {"a": torch.tensor([0.0, 0.2, 0.5]), "b": torch.tensor([0.9])}
    assert below(masks, 0.2) == {"a": [0, 1]}
    assert below(masks, 0.0) == {"a": [0]}
    assert below(masks, 1.0) == {"a": [0, 1, 2], "b": [0]}


def test_points_equal_plain_pruning_and_the_choice_keeps_the_accuracy_limit(bright: Any) -> None:
    images, labels = bright.data.images, bright.data.labels
    swept = sweep(bright.model, rising(bright), [bright.data], SweepSettings(THRESHOLDS, 0.02))
    for point in swept.points:
        assert point.filters_pruned == round(point.threshold * 10 + 0.5)
        expected = clean_accuracy(prune(bright.model, point.pruned).module, images, labels)
        assert point.clean_accuracy == pytest.approx(expected)
    *kept, last = swept.points
    assert all(swept.accuracy_before - point.clean_accuracy <= 0.02 for point in kept)
    assert swept.accuracy_before - last.clean_accuracy > 0.02
    assert swept.highest(0.02) == (kept[-1] if kept else None)


def test_without_a_limit_the_last_threshold_is_chosen(bright: Any) -> None:
    swept = sweep(bright.model, rising(bright), [bright.data], SweepSettings(THRESHOLDS, 1.0))
    chosen = swept.highest(1.0)
    assert chosen is not None
    assert chosen.threshold == 0.95


def test_with_a_limit_of_zero_nothing_may_be_chosen(bright: Any) -> None:
    masks = {"0": torch.zeros(12), "3": torch.zeros(12)}
    swept = sweep(bright.model, masks, [bright.data], SweepSettings([0.0, 0.5], 0.02, "zero_gamma_beta"))
    assert swept.highest(0.02) is None
    assert len(swept.points) == 1


def test_a_full_sweep_chooses_the_highest_threshold_within_the_limit(bright: Any) -> None:
    swept = sweep(bright.model, rising(bright), [bright.data], ALL)
    assert [point.threshold for point in swept.points] == THRESHOLDS
    kept = [point for point in swept.points if swept.accuracy_before - point.clean_accuracy <= 0.02]
    assert swept.highest(0.02) == (kept[-1] if kept else None)


def test_the_largest_drop_over_all_sets_counts(bright: Any) -> None:
    one, two = bright.data.subset(bright.data.labels == 0), bright.data.subset(bright.data.labels == 1)
    swept = [sweep(bright.model, rising(bright), sets, ALL) for sets in ([one], [two], [one, two])]
    drops = [[point.drop for point in sweep.points] for sweep in swept]
    assert drops[2] == [max(pair) for pair in zip(drops[0], drops[1], strict=True)]
    assert drops[0] != drops[1]
    assert [point.clean_accuracy for point in swept[2].points] == [point.clean_accuracy for point in swept[0].points]


def test_points_far_beyond_the_limit_are_measured_only_on_the_first_set(bright: Any) -> None:
    one, two = bright.data.subset(bright.data.labels == 0), bright.data.subset(bright.data.labels == 1)
    settings = ALL
    whole, alone = (sweep(bright.model, rising(bright), sets, settings) for sets in ([one, two], [one]))
    cut = sweep(bright.model, rising(bright), [one, two], replace(settings, hopeless=0.1))
    for full, short, first in zip(whole.points, cut.points, alone.points, strict=True):
        assert short.clean_accuracy == full.clean_accuracy
        assert short.drop == (first.drop if first.drop > 0.1 else full.drop)
    assert any(point.drop > 0.1 for point in alone.points)


def normless(bright: Any) -> Model:
    """The network without its second norm, so that a conv itself is pruned, after a normalisation."""
    network = copy.deepcopy(bright.model.network)
    network[4] = nn.Identity()
    return Model(network, "normless", 3, (3, 8, 8), Normalization((0.1,) * 3, (0.9,) * 3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [lambda bright: bright.model, normless], ids=["norms", "without a norm"])
def test_stacked_thresholds_equal_thresholds_one_after_another(
    bright: Any, make: Any, mode: PruneMode, device: str
) -> None:
    one, two = bright.data.subset(bright.data.labels == 0), bright.data.subset(bright.data.labels != 0)
    model = make(bright)
    model = model.with_network(model.clone().network.to(device))
    for hopeless in (1.0, 0.1):
        settings = SweepSettings(THRESHOLDS, 0.02, mode, False, hopeless)
        loop, stack = (
            sweep(model, rising(bright), [one, two], replace(settings, variant=variant))
            for variant in ("loop", "stack")
        )
        assert stack == loop
    assert len({point.clean_accuracy for point in stack.points}) > 1


def test_layers_that_no_threshold_changes_are_not_copied(bright: Any) -> None:
    prunings = [{}, {"3": [0]}, {"3": [0, 5]}]
    stacked = StackedPredictions([bright.model], [prunings], [bright.data.images], "zero_gamma", at_once=3)
    shapes = {name: value.shape for name, value in stacked._stacked.network.named_parameters()}
    own = {name: value.shape for name, value in bright.model.network.named_parameters()}
    assert {name for name in shapes if shapes[name] != own[name]} == {"4.weight", "4.bias"}
    alone = PrunedPredictions(bright.model, [bright.data.images], prunings, "zero_gamma")
    assert all(torch.equal(stacked.predict(0, step, 0), alone.predict(step, 0)) for step in range(3))


def test_a_network_that_cannot_be_stacked_is_swept_one_after_another(bright: Any) -> None:
    class Louder(nn.Sequential):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = super().forward(images) * len(images)
            return found

    network = Louder(*copy.deepcopy(bright.model.network)).eval()
    model = bright.model.with_network(network)
    with pytest.raises(ValueError, match="does more than call its layers"):
        StackedPredictions([model], [[{}, {"3": [0]}]], [bright.data.images], "zero_gamma", at_once=2)
    args = (model, rising(bright), [bright.data])
    assert sweep(*args, replace(ALL, variant="stack")) == sweep(*args, replace(ALL, variant="loop"))
    assert "does more" in sweep_variant([model], [steps_of(bright)], bright.data.images, "zero_gamma").reason
    stack, loop = (SweepSettings(THRESHOLDS, 0.02, variant=variant) for variant in ("stack", "loop"))
    both = ([model] * 2, [rising(bright)] * 2, [bright.data])
    assert sweep_stack(*both, stack) == sweep_stack(*both, loop)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], list[int]]:
    """Gives both variants their seconds, once; the list has an entry for each trial."""

    def fixed(*seconds: float) -> list[int]:
        tried: list[int] = []

        def least_seconds(
            device: torch.device, rounds: int, *runs: Callable[[], object], timer: Any
        ) -> Sequence[float]:
            tried.append(len([run() for run in runs]))
            return seconds

        monkeypatch.setattr("bdprune.ops.tuner.least_seconds", least_seconds)
        return tried

    return fixed


@pytest.mark.parametrize(("seconds", "winner"), [((0.5, 1.0), "stack"), ((1.0, 1.0), "loop")])
def test_the_faster_variant_of_a_sweep_is_tried_on_a_part_and_kept(
    bright: Any, timed: Callable[..., list[int]], seconds: tuple[float, float], winner: str
) -> None:
    tried = timed(*seconds)
    args = ([bright.model], [steps_of(bright)], bright.data.images, "zero_gamma")
    choice = sweep_variant(*args)
    assert choice.winner == winner and "4 thresholds of bright" in choice.shape and "[8, 3, 8, 8]" in choice.shape
    assert kept_choices() == [choice]
    assert sweep_variant(*args) == choice and tried == [2], "stored choices need no trial"


def three(bright: Any, device: str = "cpu") -> tuple[list[Model], list[dict[str, torch.Tensor]]]:
    """Models that collapse at different thresholds: masks that rise fast, like those above, and slowly."""
    masks = [{"0": torch.ones(12), "3": torch.arange(12) / by} for by in (3, 10, 30)]
    return siblings(bright.model, device=device), masks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop_early", [True, False])
def test_stacked_models_equal_models_one_after_another(
    bright: Any, mode: PruneMode, stop_early: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []
    stack = predictions.StackedPredictions

    def noted(models: Sequence[Model], *args: Any) -> StackedPredictions:
        made.append((len(models), args[-1]))
        return stack(models, *args)

    monkeypatch.setattr(predictions, "StackedPredictions", noted)
    models, masks = three(bright, device)
    for images, at_once in ((60, 2), (240, 1)):
        sets = [bright.data.subset(torch.arange(images)), bright.data.subset(torch.arange(100, 120))]
        for hopeless in (1.0, 0.1):
            settings = SweepSettings(THRESHOLDS, 0.02, mode, stop_early, hopeless)
            found = sweep_stack(models, masks, sets, replace(settings, variant="stack"))
            loop = replace(settings, variant="loop")
            assert found == [sweep(model, mask, sets, loop) for model, mask in zip(models, masks, strict=True)]
            assert made.pop() == (3, 1 if stop_early else at_once) and not made
    assert len({len(one.points) for one in found}) == (3 if stop_early else 1), (
        "each model stops at the same point as alone"
    )


def test_several_masks_of_one_model_copy_only_pruned_layers(bright: Any) -> None:
    _, masks = three(bright)
    args = ([bright.model] * 3, masks, [bright.data])
    assert sweep_stack(*args, replace(ALL, variant="stack")) == sweep_stack(*args, replace(ALL, variant="loop"))
    stack = StackedPredictions([bright.model] * 3, [[{}, {"3": [0]}]] * 3, [bright.data.images], "zero_gamma")
    assert len(stack._stacked.network.get_parameter("3.weight")) == 12
    assert len(stack._stacked.network.get_parameter("4.weight")) == 3


def test_models_whose_weights_do_not_fit_are_swept_after_the_others(
    bright: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    in_one_stack = sweeping.in_one_stack
    monkeypatch.setattr(
        sweeping, "in_one_stack", lambda models, *a, **b: asked.append(len(models)) or in_one_stack(models, *a, **b)
    )
    models, masks = three(bright)
    models, masks = [*models, *models], [*masks, *masks]
    args = (models, masks, [bright.data])
    separate = sweep_stack(*args, replace(ALL, variant="loop"))
    for fit, stacks in ((6.5, [6]), (4.5, [4, 2]), (5.5, [5]), (1.5, []), (0.5, [])):
        memory = int(fit * weight_bytes(bright.model))
        assert sweep_stack(*args, replace(ALL, variant="stack", memory=memory)) == separate
        assert asked == stacks
        asked.clear()


def test_a_cpu_sweeps_models_one_after_another_without_a_trial(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "sweep_variant", None)
    monkeypatch.setattr(sweeping, "in_one_stack", None)
    models, masks = three(bright)
    for stop_early in (True, False):
        args = ([bright.data], SweepSettings(THRESHOLDS, 0.02, stop_early=stop_early))
        found = bdprune.stack(models).sweep(masks, *args)
        assert found == [sweep(one, mask, *args) for one, mask in zip(models, masks, strict=True)]


@pytest.mark.parametrize(("seconds", "winner"), [((0.5, 1.0), "stack"), ((1.0, 1.0), "loop")])
@pytest.mark.parametrize("stop_early", [True, False])
def test_the_faster_variant_of_several_models_is_tried_and_kept(
    bright: Any, timed: Callable[..., list[int]], seconds: tuple[float, float], winner: str, stop_early: bool
) -> None:
    tried = timed(*seconds)
    args = (siblings(bright.model, 9), [steps_of(bright)] * 9, bright.data.images, "zero_gamma", stop_early)
    choice = sweep_variant(*args)
    assert choice.winner == winner and "4 thresholds of 4 x bright" in choice.shape, (
        "a trial of four models decides for nine"
    )
    assert len(tried) == (1 if stop_early else 2), "single models have their own trial"
    assert choice in kept_choices() and sweep_variant(*args) == choice
    assert len(tried) == (1 if stop_early else 2)
    assert "may stop" in sweep_variant(*(one[:1] for one in args[:2]), *args[2:4], True).reason


@pytest.mark.parametrize("variant", ["stack", "loop"])
def test_on_a_gpu_models_are_swept_by_the_stored_variant(
    bright: Any, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models on the CPU whose device has the name of a GPU."""

    class Gpu(str):
        type = "cuda"

    asked: list[Any] = []

    def found(*args: Any) -> Choice:
        asked.append(args)
        return Choice("sweep", variant, "cuda", "forced")

    monkeypatch.setattr(sweeping, "sweep_variant", found)
    models, masks = three(bright)
    args = ([bright.data], ALL)
    loop = replace(ALL, variant="loop")
    separate = [sweep(one, mask, [bright.data], loop) for one, mask in zip(models, masks, strict=True)]
    monkeypatch.setattr(Model, "device", Gpu("cpu"))
    assert sweep_stack(models, masks, *args) == separate
    assert [len(one[0]) for one in asked] == ([3] if variant == "stack" else [3, 1, 1, 1])


def test_a_sweep_that_prunes_nothing_needs_no_trial(bright: Any) -> None:
    assert "prunes anything" in sweep_variant([bright.model], [[{}]], bright.data.images, "zero_gamma").reason
