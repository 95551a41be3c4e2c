import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bdprune
from bdprune.loops import pruned_stack, sweep
from bdprune.loops.pruned import PrunedPredictions
from bdprune.loops.pruned_stack import StackedPredictions
from bdprune.loops.sweep import below, sweep_models, sweep_thresholds
from bdprune.loops.sweep_path import sweep_path
from bdprune.model.edit.pruning import MODES, PruneMode, prune
from bdprune.model.handle import Model, Normalization
from bdprune.runtime import paths
from bdprune.runtime.evaluate import clean_accuracy
from bdprune.runtime.memory import weight_bytes

from ..helpers import siblings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials are kept where no other test and no user's cache is; float32 is float32 on a GPU too."""
    monkeypatch.setenv("BDPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def ladder(bright: Any) -> dict[str, torch.Tensor]:
    """Masks 0, 0.1, ... on the last group: every threshold step prunes one filter more."""
    return {"0": torch.ones(12), "3": torch.arange(12) / 10}


def ladder_steps(bright: Any) -> list[dict[str, list[int]]]:
    """The prunings of a sweep down that ladder."""
    return [below(ladder(bright), threshold) for threshold in (-1.0, *THRESHOLDS)]


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


def normless(bright: Any) -> Model:
    """The network with its second norm left out, so that a conv is pruned itself, behind a normalisation."""
    network = copy.deepcopy(bright.model.network)
    network[4] = nn.Identity()
    return Model(network, "normless", 3, (3, 8, 8), Normalization((0.1,) * 3, (0.9,) * 3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [lambda bright: bright.model, normless], ids=["norms", "without a norm"])
def test_thresholds_at_once_are_thresholds_one_after_another(
    bright: Any, make: Any, mode: PruneMode, device: str
) -> None:
    one, two = bright.data.subset(bright.data.labels == 0), bright.data.subset(bright.data.labels != 0)
    model = make(bright)
    model = model.with_network(model.clone().network.to(device))
    args = (model, ladder(bright), [one, two], THRESHOLDS, 0.02, mode, False)
    for hopeless in (1.0, 0.1):
        loop, stack = (sweep_thresholds(*args, hopeless=hopeless, way=way) for way in ("loop", "stack"))
        assert stack == loop
    assert len({point.clean_accuracy for point in stack.points}) > 1


def test_layers_that_no_threshold_touches_are_not_copied(bright: Any) -> None:
    prunings = [{}, {"3": [0]}, {"3": [0, 5]}]
    together = StackedPredictions([bright.model], [prunings], [bright.data.images], "zero_gamma", at_once=3)
    shapes = {name: value.shape for name, value in together._stacked.network.named_parameters()}
    own = {name: value.shape for name, value in bright.model.network.named_parameters()}
    assert {name for name in shapes if shapes[name] != own[name]} == {"4.weight", "4.bias"}
    alone = PrunedPredictions(bright.model, [bright.data.images], prunings, "zero_gamma")
    assert all(torch.equal(together.predict(0, step, 0), alone.predict(step, 0)) for step in range(3))


def test_a_network_that_is_no_stack_is_swept_one_after_another(bright: Any) -> None:
    class Louder(nn.Sequential):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = super().forward(images) * len(images)
            return found

    network = Louder(*copy.deepcopy(bright.model.network)).eval()
    model = bright.model.with_network(network)
    with pytest.raises(ValueError, match="does more than its layers do"):
        StackedPredictions([model], [[{}, {"3": [0]}]], [bright.data.images], "zero_gamma", at_once=2)
    args = (model, ladder(bright), [bright.data], THRESHOLDS, 0.02, "zero_gamma", False)
    assert sweep_thresholds(*args, way="stack") == sweep_thresholds(*args, way="loop")
    assert "does more" in sweep_path([model], [ladder_steps(bright)], bright.data.images, "zero_gamma").reason
    both = ([model] * 2, [ladder(bright)] * 2, [bright.data], THRESHOLDS, 0.02, "zero_gamma")
    assert sweep_models(*both, way="stack") == sweep_models(*both, way="loop")


@pytest.mark.parametrize(("seconds", "path"), [((0.5, 1.0), "stack"), ((1.0, 1.0), "loop")])
def test_the_faster_way_of_a_sweep_is_tried_on_a_part_and_kept(
    bright: Any, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float], path: str
) -> None:
    def fastest(device: torch.device, rounds: int, *runs: Any) -> Sequence[float]:
        for run in runs:
            run()
        return seconds

    monkeypatch.setattr("bdprune.loops.sweep_path.least_seconds", fastest)
    args = ([bright.model], [ladder_steps(bright)], bright.data.images, "zero_gamma")
    choice = sweep_path(*args)
    assert choice.path == path and "sweep of 4 x bright" in choice.shape and "[8, 3, 8, 8]" in choice.shape
    assert list(paths.KEPT.read().values()) == [choice]
    monkeypatch.setattr("bdprune.loops.sweep_path.least_seconds", None)
    assert sweep_path(*args) == choice, "kept choices need no trial"


def three(bright: Any, device: str = "cpu") -> tuple[list[Model], list[dict[str, torch.Tensor]]]:
    """Models that fall at different thresholds: masks that rise fast, as the ladder does, and slowly."""
    masks = [{"0": torch.ones(12), "3": torch.arange(12) / by} for by in (3, 10, 30)]
    return siblings(bright.model, device=device), masks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop_early", [True, False])
def test_models_at_once_are_models_one_after_another(
    bright: Any, mode: PruneMode, stop_early: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []
    stack = pruned_stack.StackedPredictions

    def noted(models: Sequence[Model], *args: Any) -> StackedPredictions:
        made.append((len(models), args[-1]))
        return stack(models, *args)

    monkeypatch.setattr(pruned_stack, "StackedPredictions", noted)
    models, masks = three(bright, device)
    for images, at_once in ((60, 2), (240, 1)):
        sets = [bright.data.subset(torch.arange(images)), bright.data.subset(torch.arange(100, 120))]
        for hopeless in (1.0, 0.1):
            args = (models, masks, sets, THRESHOLDS, 0.02, mode, stop_early, hopeless)
            found = sweep_models(*args, way="stack")
            assert found == [
                sweep_thresholds(model, mask, *args[2:], way="loop") for model, mask in zip(models, masks, strict=True)
            ]
            assert made.pop() == (3, 1 if stop_early else at_once) and not made
    assert len({len(one.points) for one in found}) == (3 if stop_early else 1), "each should stop where it stops alone"


def test_masks_of_one_model_at_once_copy_only_what_is_pruned(bright: Any) -> None:
    _, masks = three(bright)
    args = ([bright.model] * 3, masks, [bright.data], THRESHOLDS, 0.02, "zero_gamma", False)
    assert sweep_models(*args, way="stack") == sweep_models(*args, way="loop")
    stack = StackedPredictions([bright.model] * 3, [[{}, {"3": [0]}]] * 3, [bright.data.images], "zero_gamma")
    assert len(stack._stacked.network.get_parameter("3.weight")) == 12
    assert len(stack._stacked.network.get_parameter("4.weight")) == 3


def test_models_for_whose_weights_there_is_no_room_are_swept_after_the_others(
    bright: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    in_one_stack = sweep.in_one_stack
    monkeypatch.setattr(
        sweep, "in_one_stack", lambda models, *a, **b: asked.append(len(models)) or in_one_stack(models, *a, **b)
    )
    models, masks = three(bright)
    models, masks = [*models, *models], [*masks, *masks]
    args = (models, masks, [bright.data], THRESHOLDS, 0.02, "zero_gamma", False)
    separate = sweep_models(*args, way="loop")
    for room, stacks in ((6.5, [6]), (4.5, [4, 2]), (5.5, [5]), (1.5, []), (0.5, [])):
        memory = int(room * weight_bytes(bright.model))
        assert sweep_models(*args, memory=memory, way="stack") == separate
        assert asked == stacks
        asked.clear()


def test_a_cpu_sweeps_models_one_after_another_without_a_trial(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "sweep_path", None)
    monkeypatch.setattr(sweep, "in_one_stack", None)
    models, masks = three(bright)
    for stop_early in (True, False):
        args = ([bright.data], THRESHOLDS, 0.02, "zero_gamma", stop_early)
        found = bdprune.stack(models).sweep(masks, *args)
        assert found == [sweep_thresholds(one, mask, *args) for one, mask in zip(models, masks, strict=True)]


@pytest.mark.parametrize(("seconds", "path"), [((0.5, 1.0), "stack"), ((1.0, 1.0), "loop")])
@pytest.mark.parametrize("stop_early", [True, False])
def test_the_faster_way_of_several_models_is_tried_and_kept(
    bright: Any, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float], path: str, stop_early: bool
) -> None:
    tried: list[int] = []

    def fastest(device: torch.device, rounds: int, *runs: Any) -> Sequence[float]:
        tried.append(len(runs))
        for run in runs:
            run()
        return seconds

    monkeypatch.setattr("bdprune.loops.sweep_path.least_seconds", fastest)
    args = (siblings(bright.model, 9), [ladder_steps(bright)] * 9, bright.data.images, "zero_gamma", stop_early)
    choice = sweep_path(*args)
    assert choice.path == path and "sweep of 4 x 4 x bright" in choice.shape, "four speak for nine"
    assert len(tried) == (1 if stop_early else 2), "each alone goes its own way, which is tried as well"
    assert choice in paths.KEPT.read().values() and sweep_path(*args) == choice
    assert len(tried) == (1 if stop_early else 2)
    assert "may stop" in sweep_path(*(one[:1] for one in args[:2]), *args[2:4], True).reason


@pytest.mark.parametrize("way", ["stack", "loop"])
def test_elsewhere_models_are_swept_by_the_way_that_was_found(
    bright: Any, way: paths.Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models whose device is named like a GPU, while they lie on the CPU."""

    class Gpu(str):
        type = "cuda"

    asked: list[Any] = []

    def found(*args: Any) -> paths.PathChoice:
        asked.append(args)
        return paths.PathChoice(way, "cuda", "forced")

    monkeypatch.setattr(sweep, "sweep_path", found)
    models, masks = three(bright)
    args = ([bright.data], THRESHOLDS, 0.02, "zero_gamma", False)
    separate = [sweep_thresholds(one, mask, *args, way="loop") for one, mask in zip(models, masks, strict=True)]
    monkeypatch.setattr(Model, "device", Gpu("cpu"))
    assert sweep_models(models, masks, *args) == separate
    assert [len(one[0]) for one in asked] == ([3] if way == "stack" else [3, 1, 1, 1])


def test_a_sweep_that_prunes_nothing_needs_no_trial(bright: Any) -> None:
    assert "prunes anything" in sweep_path([bright.model], [[{}]], bright.data.images, "zero_gamma").reason
