import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bdprune.data.clean import CleanData
from bdprune.errors import TrainingError
from bdprune.loops.unlearning import UnlearnSettings, _Snapshot, unlearn
from bdprune.model.handle import Model


@pytest.fixture
def model(bright: Any) -> Model:
    return bright.model  # type: ignore[no-any-return]


@pytest.fixture
def data(bright: Any) -> CleanData:
    return bright.data.subset(torch.arange(120))  # type: ignore[no-any-return]


SETTINGS = UnlearnSettings(lr=0.05, weight_decay=0, batch_size=30, padding=0, max_epochs=40)


def state(model: Model) -> Tensor:
    return torch.cat([value.flatten().float() for value in model.network.state_dict().values()])


def test_forgets_the_task_and_leaves_the_model_alone(model: Model, data: CleanData) -> None:
    before = state(model)
    result = unlearn(model, data, SETTINGS, seed=0)
    assert torch.equal(state(model), before)
    assert result.stopped
    assert result.trajectory[0].accuracy > 0.9
    assert result.trajectory[-1].accuracy <= 1 / 3
    assert all(step.accuracy > 1 / 3 for step in result.trajectory[:-1])
    assert result.trajectory[-1].loss > result.trajectory[0].loss
    assert result.steps_per_epoch == 4


def test_votes_of_a_step_add_up(model: Model, data: CleanData) -> None:
    for step in unlearn(model, data, SETTINGS, seed=0).trajectory:
        assert sum(step.votes) == sum(step.label_counts) == 30
        assert sum(step.votes) - sum(step.wrong_votes) == round(step.accuracy * 30)


def test_stopping_by_epoch_ends_with_whole_epochs(model: Model, data: CleanData) -> None:
    result = unlearn(model, data, replace(SETTINGS, stop_on="epoch", stop_accuracy=0.4), seed=0)
    assert result.stopped
    assert len(result.trajectory) % 4 == 0


def test_same_seed_same_trajectory(model: Model, data: CleanData) -> None:
    one, two = (unlearn(model, data, SETTINGS, seed=3) for _ in range(2))
    assert one.trajectory == two.trajectory
    assert one.trajectory != unlearn(model, data, SETTINGS, seed=4).trajectory


def test_learning_rate_falls_when_the_loss_explodes(model: Model, data: CleanData) -> None:
    result = unlearn(model, data, replace(SETTINGS, lr=1e38, retries=40, stop_accuracy=0.0, max_epochs=3), seed=0)
    assert result.lr < 1e37
    assert math.isfinite(state(result.model).abs().max())


def test_no_finite_step_is_an_error(model: Model, data: CleanData) -> None:
    broken = model.clone()
    with torch.no_grad():
        broken.network.get_parameter("8.weight").fill_(float("inf"))
    with pytest.raises(TrainingError, match="not finite"):
        unlearn(broken, data, replace(SETTINGS, retries=2), seed=0)


def test_learning_rate_fits_the_network(model: Model, data: CleanData) -> None:
    quick = unlearn(model, data, replace(SETTINGS, lr=5.0), seed=0)
    slower = unlearn(model, data, replace(SETTINGS, lr=5.0, min_steps=12), seed=0)
    assert len(quick.trajectory) < 12 <= len(slower.trajectory)
    assert slower.lr < 5.0
    idle = replace(SETTINGS, lr=1e-4, max_epochs=2)
    assert not unlearn(model, data, idle, seed=0).stopped
    assert unlearn(model, data, replace(idle, raises=2), seed=0).lr == pytest.approx(9e-4)


def test_few_images_leave_running_statistics_alone(model: Model, data: CleanData) -> None:
    few = data.subset(torch.arange(30))
    kept = unlearn(model, few, replace(SETTINGS, small_data=64, max_epochs=2), seed=0).model
    drifted = unlearn(model, few, replace(SETTINGS, small_data=0, max_epochs=2), seed=0).model
    assert torch.equal(kept.network.get_buffer("1.running_mean"), model.network.get_buffer("1.running_mean"))
    assert not torch.equal(drifted.network.get_buffer("1.running_mean"), model.network.get_buffer("1.running_mean"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_snapshot_goes_back_to_the_last_finite_state(model: Model, value: float) -> None:
    network = model.clone().network
    snapshot = _Snapshot(network)
    weight, mean = network.get_parameter("3.weight"), network.get_buffer("4.running_mean")
    with torch.no_grad():
        weight[0] = 2.0
        assert snapshot.take()
        weight[1] = 3.0
        mean[5] = value
        assert not snapshot.take()
    snapshot.restore()
    assert (weight[0] == 2.0).all()
    assert torch.equal(weight[1:], model.network.get_parameter("3.weight")[1:])
    assert torch.equal(mean, model.network.get_buffer("4.running_mean"))
