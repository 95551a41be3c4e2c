"""Unlearning of one model, bit for bit like a plain loop, and of several models in the same steps."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bdprune.data.clean import CleanData
from bdprune.errors import BudgetError, TrainingError
from bdprune.loops import unlearning
from bdprune.loops.unlearning import Unlearned, UnlearnSettings, unlearn, unlearn_stack
from bdprune.model.handle import Model
from bdprune.runtime import Budget, training
from bdprune.runtime.training import LateWatch

from ..helpers import broken, siblings
from .plain import ascend

pytestmark = pytest.mark.usefixtures("exact")


@pytest.fixture
def model(bright: Any) -> Model:
    return bright.model  # type: ignore[no-any-return]


@pytest.fixture
def data(bright: Any) -> CleanData:
    return bright.data.subset(torch.arange(120))  # type: ignore[no-any-return]


SETTINGS = UnlearnSettings(lr=0.05, weight_decay=0, batch_size=30, padding=0, max_epochs=40)

MANY: dict[str, dict[str, Any]] = {
    "batch": {"lr": 0.02},
    "epoch": {"lr": 0.015, "stop_on": "epoch", "max_epochs": 8},
    "milestones": {"lr": 0.02, "stop_on": "epoch", "milestones": (1, 2)},
    "a milestone at once": {"lr": 0.2, "milestones": (0, 2, 2), "stop_accuracy": 0.0},
    "share": {"lr": 0.02, "stop_share": 0.6},
    "lowered": {"lr": 0.2, "min_steps": 9},
    "raised": {"lr": 1e-4, "max_epochs": 2, "raises": 1},
    "few images": {"lr": 0.02, "small_data": 1000, "max_epochs": 3},
    "two shapes of batch": {"lr": 0.02, "batch_size": 37, "weight_decay": 0.0},
    "a state that is not finite": {"lr": 1e38, "stop_accuracy": 0.0, "max_epochs": 2, "retries": 40},
}


def settings_of(name: str) -> UnlearnSettings:
    return UnlearnSettings(**{"batch_size": 50, "max_epochs": 6, "padding": 1, **MANY[name]})


def state(model: Model) -> Tensor:
    return torch.cat([value.flatten().float() for value in model.network.state_dict().values()])


def assert_same(mine: Unlearned | TrainingError, alone: Unlearned) -> None:
    assert isinstance(mine, Unlearned)
    assert (mine.lr, mine.stopped, mine.steps_per_epoch) == (alone.lr, alone.stopped, alone.steps_per_epoch)
    for ours, theirs in zip(mine.trajectory, alone.trajectory, strict=True):
        assert replace(ours, loss=theirs.loss) == theirs
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3, abs=1e-4)
    others = alone.model.network.state_dict()
    for key, value in mine.model.network.state_dict().items():
        torch.testing.assert_close(value, others[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MANY)
def test_one_model_unlearns_bit_for_bit_like_a_plain_loop(bright: Any, name: str) -> None:
    settings = settings_of(name)
    found = unlearn(bright.model, bright.data, settings, seed=3, precision="float32")
    floor = 1 / 3 if settings.stop_accuracy is None else settings.stop_accuracy
    if settings.stop_share is not None:
        right = (bright.model.module(bright.data.images).argmax(1) == bright.data.labels).float()
        floor = settings.stop_share * right.mean().item()
    weights, seen, stopped = ascend(bright.model, bright.data, settings, found.lr, floor, seed=3)
    assert [(step.loss, step.accuracy) for step in found.trajectory] == seen and found.stopped == stopped
    assert all(torch.equal(value, weights[key]) for key, value in found.model.network.state_dict().items())
    assert (found.lr == settings.lr) == (name not in ("lowered", "raised", "a state that is not finite"))


@pytest.mark.parametrize("name", [name for name in MANY if not name.startswith("a ")])
def test_several_models_unlearn_as_each_alone(bright: Any, name: str, device: str) -> None:
    models = siblings(bright.model, device=device)
    stacked = unlearn_stack(models, bright.data, settings_of(name), seed=3)
    for model, mine in zip(models, stacked, strict=True):
        assert_same(mine, unlearn(model, bright.data, settings_of(name), seed=3))
    lengths = {len(mine.trajectory) for mine in stacked if isinstance(mine, Unlearned)}
    assert name not in ("batch", "epoch") or len(lengths) > 1, "the models should stop at different steps"


def test_a_stack_of_one_equals_the_model_alone(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The strategy for a GPU."""
    settings = UnlearnSettings(lr=0.02, batch_size=50, max_epochs=3, padding=1, retries=0)
    alone = unlearn(bright.model, bright.data, settings, seed=3)
    monkeypatch.setattr(unlearning, "trainer_for", lambda models: training.ManyModels)
    assert_same(unlearn(bright.model, bright.data, settings, seed=3), alone)
    with pytest.raises(TrainingError, match="not finite at learning rate"):
        unlearn(broken(bright.model), bright.data, settings)


def test_on_a_cpu_one_model_is_not_stacked_and_no_model_gives_nothing(bright: Any) -> None:
    assert training.trainer_for([bright.model]) is training.OneModel
    assert training.trainer_for([bright.model] * 2) is training.ManyModels
    assert unlearn_stack([], bright.data, SETTINGS) == []


@pytest.mark.parametrize("name", [name for name in MANY if not name.startswith("a ")])
def test_an_epoch_after_all_have_stopped_changes_nothing(
    bright: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(name)
    run = partial(unlearn_stack, siblings(bright.model), bright.data, settings, seed=3)
    tries: list[int] = []
    lower_rates = training.ManyModels.lower_rates  # called once before the first epoch and once after each
    monkeypatch.setattr(
        training.ManyModels, "lower_rates", lambda one, times: tries.append(id(one)) or lower_rates(one, times)
    )
    at_once, needed = run(), list(Counter(tries).values())
    tries.clear()
    flags = torch.zeros(2, dtype=torch.bool)
    monkeypatch.setattr(training, "watch_on", lambda device: LateWatch(flags, lambda: lambda: True))
    late, spent = run(), list(Counter(tries).values())
    assert spent == [min(epochs + 1, settings.max_epochs + 1) for epochs in needed]
    for ours, theirs in zip(late, at_once, strict=True):
        assert isinstance(ours, Unlearned) and isinstance(theirs, Unlearned)
        assert replace(ours, model=theirs.model, half_way=theirs.half_way) == theirs
        weights = theirs.model.network.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in ours.model.network.state_dict().items())


def test_a_model_that_fails_does_not_stop_the_others(bright: Any) -> None:
    settings = UnlearnSettings(lr=0.02, batch_size=50, max_epochs=3, padding=1, retries=1)
    models = [bright.model, broken(bright.model), siblings(bright.model)[1]]
    stacked = unlearn_stack(models, bright.data, settings)
    assert isinstance(stacked[1], TrainingError) and "learning rate 0.002" in str(stacked[1])
    for index in (0, 2):
        assert_same(stacked[index], unlearn(models[index], bright.data, settings))


@pytest.mark.parametrize("count", [1, 2])
def test_a_non_finite_step_is_undone(bright: Any, count: int) -> None:
    settings = UnlearnSettings(lr=1e30, batch_size=50, max_epochs=2, padding=1, retries=0)
    models = siblings(bright.model, 2)[:count]
    for model, mine in zip(models, unlearn_stack(models, bright.data, settings), strict=True):
        alone = unlearn_stack([model], bright.data, settings)[0]
        if isinstance(alone, TrainingError):
            assert isinstance(mine, TrainingError) and str(mine) == str(alone)
        else:
            assert isinstance(mine, Unlearned)
            assert len(mine.trajectory) == len(alone.trajectory) and not mine.stopped
            assert all(value.isfinite().all() for value in mine.model.network.state_dict().values())


def runs(model: Model, data: CleanData, settings: UnlearnSettings, seed: int = 0) -> Sequence[Unlearned]:
    """Alone, and as one of two."""
    stacked = unlearn_stack([model, model], data, settings, seed)[1]
    assert isinstance(stacked, Unlearned)
    return unlearn(model, data, settings, seed), stacked


def test_unlearning_forgets_the_task_and_leaves_the_model_unchanged(model: Model, data: CleanData) -> None:
    before = state(model)
    for result in runs(model, data, SETTINGS):
        assert torch.equal(state(model), before)
        assert result.stopped
        assert result.trajectory[0].accuracy > 0.9
        assert result.trajectory[-1].accuracy <= 1 / 3
        assert all(step.accuracy > 1 / 3 for step in result.trajectory[:-1])
        assert result.trajectory[-1].loss > result.trajectory[0].loss
        assert result.steps_per_epoch == 4


def test_votes_of_a_step_add_up(model: Model, data: CleanData) -> None:
    for step in (step for result in runs(model, data, SETTINGS) for step in result.trajectory):
        assert sum(step.votes) == sum(step.label_counts) == 30
        assert sum(step.votes) - sum(step.wrong_votes) == round(step.accuracy * 30)


def test_stopping_by_epoch_ends_after_a_whole_epoch(model: Model, data: CleanData) -> None:
    for result in runs(model, data, replace(SETTINGS, stop_on="epoch", stop_accuracy=0.4)):
        assert result.stopped
        assert len(result.trajectory) % 4 == 0


def test_the_same_seed_gives_the_same_trajectory(model: Model, data: CleanData) -> None:
    for one, two, other in zip(*(runs(model, data, SETTINGS, seed) for seed in (3, 3, 4)), strict=True):
        assert one.trajectory == two.trajectory
        assert one.trajectory != other.trajectory


def test_learning_rate_falls_when_the_loss_explodes(model: Model, data: CleanData) -> None:
    for result in runs(model, data, replace(SETTINGS, lr=1e38, retries=40, stop_accuracy=0.0, max_epochs=3)):
        assert result.lr < 1e37
        assert math.isfinite(state(result.model).abs().max())


def test_no_finite_step_is_an_error(model: Model, data: CleanData) -> None:
    with pytest.raises(TrainingError, match="not finite"):
        unlearn(broken(model, math.inf), data, replace(SETTINGS, retries=2), seed=0)


def test_learning_rate_fits_the_network(model: Model, data: CleanData) -> None:
    quick = unlearn(model, data, replace(SETTINGS, lr=5.0), seed=0)
    slower = unlearn(model, data, replace(SETTINGS, lr=5.0, min_steps=12), seed=0)
    assert len(quick.trajectory) < 12 <= len(slower.trajectory)
    assert slower.lr < 5.0
    idle = replace(SETTINGS, lr=1e-4, max_epochs=2)
    assert not unlearn(model, data, idle, seed=0).stopped
    assert unlearn(model, data, replace(idle, raises=2), seed=0).lr == pytest.approx(9e-4)


def test_few_images_leave_running_statistics_unchanged(model: Model, data: CleanData) -> None:
    few = data.subset(torch.arange(30))
    own = model.network.get_buffer("1.running_mean")
    for kept in runs(model, few, replace(SETTINGS, small_data=64, max_epochs=2)):
        assert torch.equal(kept.model.network.get_buffer("1.running_mean"), own)
    for drifted in runs(model, few, replace(SETTINGS, small_data=0, max_epochs=2)):
        assert not torch.equal(drifted.model.network.get_buffer("1.running_mean"), own)


def test_the_half_way_model_is_kept_and_the_trajectory_is_unchanged(bright: Any) -> None:
    settings = UnlearnSettings(weight_decay=5e-4, min_steps=8, raises=1)
    done = unlearn(bright.model, bright.data, settings)
    first = done.trajectory[0].accuracy
    fallen = [step.accuracy <= 0.6 * first for step in done.trajectory]
    assert done.half_way is not None and fallen.index(True) < len(fallen) - 1
    states = [model.network.state_dict() for model in (bright.model, done.half_way, done.model)]
    assert all(any(not torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(states))
    assert not done.half_way.network.training


@pytest.mark.parametrize("settings", [UnlearnSettings(weight_decay=5e-4, min_steps=8, raises=1), UnlearnSettings()])
def test_a_stack_keeps_the_same_models_half_way(bright: Any, settings: UnlearnSettings) -> None:
    """Else a scan of many models, or of one on a GPU, would rank other filters than a scan of one on a CPU."""
    other = bright.model.clone()
    with torch.no_grad():
        for value in other.network.parameters():
            value.mul_(1.1)
    models = [bright.model, other]
    for single, stacked in zip(models, unlearn_stack(models, bright.data, settings), strict=True):
        alone = unlearn(single, bright.data, settings)
        assert isinstance(stacked, Unlearned) and stacked.half_way is not None and alone.half_way is not None
        expected = alone.half_way.network.state_dict()
        for name, value in stacked.half_way.network.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
        assert any(not torch.equal(value, stacked.model.network.state_dict()[name]) for name, value in expected.items())


def test_it_gives_up_once_the_fewest_steps_do_not_fit(
    model: Model, data: CleanData, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    real = unlearning.mean_losses
    monkeypatch.setattr(time, "monotonic", lambda: float(len(steps)))  # a step takes a second
    monkeypatch.setattr(time, "perf_counter", lambda: float(len(steps)))

    def counted(*given: Any) -> Any:
        steps.append(1)
        return real(*given)

    monkeypatch.setattr(unlearning, "mean_losses", counted)
    with pytest.raises(BudgetError, match="It needs about 999 s more, and 19 s of the budget are left"):
        unlearn(model, data, replace(SETTINGS, min_steps=1000), budget=Budget(seconds=20).started())
    assert len(steps) == 1, "the first step shows that 1,000 steps do not fit"
    steps.clear()
    with pytest.raises(BudgetError):
        unlearn(model, data, replace(SETTINGS, stop_accuracy=0.0), budget=Budget(seconds=5).started())
    assert len(steps) == 5


def test_a_budget_with_time_to_spare_changes_nothing(model: Model, data: CleanData) -> None:
    one, two = (unlearn(model, data, SETTINGS, budget=budget) for budget in (Budget(), Budget(seconds=600).started()))
    assert one.trajectory == two.trajectory
