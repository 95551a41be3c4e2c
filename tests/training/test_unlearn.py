import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bdprune.data.clean import CleanData
from bdprune.errors import TrainingError
from bdprune.model.handle import Model
from bdprune.training.fit import Schedule, fit
from bdprune.training.unlearn import UnlearnSettings, batches, unlearn


def task(count: int = 120) -> CleanData:
    """Three classes of brightness."""
    labels = torch.arange(count) % 3
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) / 5
    return CleanData(noise + 0.35 * labels.view(-1, 1, 1, 1), labels)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    data = task()
    fit(net, (data.images * 255).to(torch.uint8), data.labels, Schedule(epochs=12, batch_size=24, padding=0), 0)
    return Model(net, "test", 3, (3, 8, 8))


SETTINGS = UnlearnSettings(lr=0.05, weight_decay=0, batch_size=30, padding=0, max_epochs=40)


def state(model: Model) -> Tensor:
    return torch.cat([value.flatten().float() for value in model.network.state_dict().values()])


def test_forgets_the_task_and_leaves_the_model_alone(model: Model) -> None:
    before = state(model)
    result = unlearn(model, task(), SETTINGS, seed=0)
    assert torch.equal(state(model), before)
    assert result.stopped
    assert result.trajectory[0].accuracy > 0.9
    assert result.trajectory[-1].accuracy <= 1 / 3
    assert all(step.accuracy > 1 / 3 for step in result.trajectory[:-1])
    assert result.trajectory[-1].loss > result.trajectory[0].loss
    assert result.steps_per_epoch == 4


def test_votes_of_a_step_add_up(model: Model) -> None:
    for step in unlearn(model, task(), SETTINGS, seed=0).trajectory:
        assert sum(step.votes) == sum(step.label_counts) == 30
        assert sum(step.votes) - sum(step.wrong_votes) == round(step.accuracy * 30)


def test_stopping_by_epoch_ends_with_whole_epochs(model: Model) -> None:
    result = unlearn(model, task(), replace(SETTINGS, stop_on="epoch", stop_accuracy=0.4), seed=0)
    assert result.stopped
    assert len(result.trajectory) % 4 == 0


def test_same_seed_same_trajectory(model: Model) -> None:
    one, two = (unlearn(model, task(), SETTINGS, seed=3) for _ in range(2))
    assert one.trajectory == two.trajectory
    assert one.trajectory != unlearn(model, task(), SETTINGS, seed=4).trajectory


def test_learning_rate_falls_when_the_loss_explodes(model: Model) -> None:
    result = unlearn(model, task(), replace(SETTINGS, lr=1e38, retries=40, stop_accuracy=0.0, max_epochs=3), seed=0)
    assert result.lr < 1e37
    assert math.isfinite(state(result.model).abs().max())


def test_no_finite_step_is_an_error(model: Model) -> None:
    broken = model.clone()
    with torch.no_grad():
        broken.network.get_parameter("5.weight").fill_(float("inf"))
    with pytest.raises(TrainingError, match="not finite"):
        unlearn(broken, task(), replace(SETTINGS, retries=2), seed=0)


def test_learning_rate_fits_the_network(model: Model) -> None:
    quick = unlearn(model, task(), replace(SETTINGS, lr=5.0), seed=0)
    slower = unlearn(model, task(), replace(SETTINGS, lr=5.0, min_steps=6), seed=0)
    assert len(quick.trajectory) < 6 <= len(slower.trajectory)
    assert slower.lr < 5.0
    idle = replace(SETTINGS, lr=1e-4, max_epochs=2)
    assert not unlearn(model, task(), idle, seed=0).stopped
    assert unlearn(model, task(), replace(idle, raises=2), seed=0).lr == pytest.approx(9e-4)


def test_few_images_leave_running_statistics_alone(model: Model) -> None:
    few = task(30)
    kept = unlearn(model, few, replace(SETTINGS, small_data=64, max_epochs=2), seed=0).model
    drifted = unlearn(model, few, replace(SETTINGS, small_data=0, max_epochs=2), seed=0).model
    assert torch.equal(kept.network.get_buffer("1.running_mean"), model.network.get_buffer("1.running_mean"))
    assert not torch.equal(drifted.network.get_buffer("1.running_mean"), model.network.get_buffer("1.running_mean"))


def test_batches_pass_over_every_image_once() -> None:
    data = task(50)
    seen = torch.cat(
        [labels for _, labels in batches(data, 16, 0, torch.Generator().manual_seed(0), torch.device("cpu"))]
    )
    assert seen.bincount().tolist() == data.labels.bincount().tolist()
