import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.data import RawImages
from bdprune.errors import OptionError, TrainingError
from bdprune.loops.fitting import Schedule, fit
from bdprune.loops.resume import Checkpoint
from bdprune.runtime import precision
from bdprune.runtime.batches import crop_and_flip


def stripes(count: int = 256) -> tuple[Tensor, Tensor]:
    """Bright images of class 1, dark ones of class 0, with noise."""
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 60, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    return (noise + 150 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels


def network(dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(8, 2),
        )


def same(one: nn.Module, two: nn.Module) -> bool:
    states = one.state_dict(), two.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


def test_training_learns_the_task_and_ends_in_eval_mode() -> None:
    images, labels = stripes()
    net = network()
    seen: list[tuple[int, int, float]] = []
    fit(net, RawImages(images, labels), Schedule(epochs=4, batch_size=32), 0, lambda *now: seen.append(now))
    assert not net.training
    assert (net(images.float() / 255).argmax(1) == labels).float().mean() == 1
    assert [done for done, _, _ in seen] == list(range(1, 33))
    assert seen[-1][2] < seen[0][2] / 2
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_weights_depend_on_the_seed() -> None:
    images, labels = stripes(64)
    nets = [network() for _ in range(3)]
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        fit(net, RawImages(images, labels), Schedule(epochs=1, batch_size=32), seed)
    assert same(nets[0], nets[1])
    assert not same(nets[0], nets[2])


@pytest.mark.parametrize(("bf16", "hardware"), [(False, True), (True, True), (True, False)])
def test_plain_training_equals_this_loop_bit_for_bit(
    bf16: bool, hardware: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of existing zoos depend on the order of its random draws and operations."""
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: hardware)
    images, labels = stripes(72)
    schedule = Schedule(epochs=2, batch_size=16, peak_lr=0.1, padding=2, bf16=bf16)
    ours, expected = network(), network()
    fit(ours, RawImages(images, labels), schedule, 5)

    expected.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD(expected.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8, pct_start=0.25, cycle_momentum=False)
    for _ in range(2):
        for index in torch.randperm(72, generator=generator)[:64].split(16):
            batch = crop_and_flip(images[index], generator, 2).float() / 255
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and hardware):
                loss = functional.cross_entropy(expected(batch).float(), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
    assert same(ours, expected)


def test_steps_divide_the_rate_at_the_milestones(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step

    def noted(self: torch.optim.SGD, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    images, labels = stripes(32)
    schedule = Schedule(epochs=5, batch_size=16, peak_lr=0.1, policy="steps", milestones=(1, 3), bf16=False)
    fit(network(), RawImages(images, labels), schedule, 0)
    assert rates == pytest.approx([0.1] * 2 + [0.01] * 4 + [0.001] * 4)


def test_papers_schedule() -> None:
    schedule = Schedule(epochs=200, peak_lr=0.1, policy="steps")
    assert (schedule.milestones, schedule.decay, schedule.batch_size, schedule.weight_decay) == (
        (60, 120),
        0.1,
        128,
        5e-4,
    )


class Killed(Exception):
    pass


def moved(net: nn.Module) -> nn.Module:
    for parameter in net.parameters():
        parameter.data += 1
    return net


def killed_at(step: int) -> Callable[[int, int, float], None]:
    def progress(done: int, steps: int, loss: float) -> None:
        if done == step:
            raise Killed

    return progress


class Moving:
    """An objective with its own state: a running mean of its losses weights the next ones."""

    def __init__(self) -> None:
        self.mean = torch.tensor(1.0)
        self.generator = torch.Generator().manual_seed(3)

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor, done: float) -> Tensor:
        images = images + 0.1 * torch.rand(images.shape, generator=self.generator)
        loss = functional.cross_entropy(network(images).float(), labels)
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        return loss * (1 + self.mean * done)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]
        self.generator.set_state(state["generator"])


class Steps(list[int]):
    """Records the steps."""

    def __call__(self, done: int, steps: int, loss: float) -> None:
        self.append(done)


@pytest.mark.parametrize("policy", ["one-cycle", "steps"])
def test_a_training_killed_after_any_step_resumes_to_the_same_weights(tmp_path: Path, policy: Any) -> None:
    data = stripes(52)
    schedule = Schedule(epochs=2, batch_size=16, peak_lr=0.1, bf16=False, policy=policy, milestones=(1,))
    expected = network(dropout=0.5)
    fit(expected, RawImages(*data), schedule, 1, objective=Moving())
    for step in range(1, 7):
        path = tmp_path / str(step)
        with pytest.raises(Killed):
            fit(network(0.5), RawImages(*data), schedule, 1, killed_at(step), Moving(), Checkpoint(path, "r", every=0))
        assert path.exists() == (step > 1)
        resumed, seen = network(0.5), Steps()
        fit(resumed, RawImages(*data), schedule, 1, seen, Moving(), Checkpoint(path, "r"))
        assert seen == list(range(step, 7))
        assert same(resumed, expected), step


def test_a_training_killed_repeatedly_resumes_to_the_same_weights(tmp_path: Path) -> None:
    data, path = stripes(48), tmp_path / "c"
    schedule = Schedule(epochs=3, batch_size=16, peak_lr=0.1, bf16=False)
    expected = network()
    fit(expected, RawImages(*data), schedule, 1)
    for step in (2, 3, 5, 8, 9):
        with pytest.raises(Killed):
            fit(network(), RawImages(*data), schedule, 1, killed_at(step), None, Checkpoint(path, "r", every=0))
    resumed, finished, seen = network(), network(), Steps()
    fit(resumed, RawImages(*data), schedule, 1, checkpoint=Checkpoint(path, "r", every=0))
    fit(finished, RawImages(*data), schedule, 1, seen, checkpoint=Checkpoint(path, "r"))
    assert same(resumed, expected)
    assert same(finished, expected) and not seen and not finished.training


def test_a_checkpoint_of_another_training_is_ignored_and_kept(tmp_path: Path) -> None:
    images, labels = stripes(48)
    schedule = Schedule(epochs=1, batch_size=16, bf16=False)
    fit(network(), RawImages(images, labels), schedule, 1, checkpoint=Checkpoint(tmp_path / "c", "r"))
    others: list[tuple[Any, ...]] = [
        (network(), RawImages(images, labels), schedule, 2),
        (network(), RawImages(images, 1 - labels), schedule, 1),
        (network(), RawImages(images.flip(0), labels), schedule, 1),
        (network(), RawImages(images, labels), Schedule(epochs=1, batch_size=16, bf16=False, peak_lr=0.1), 1),
        (moved(network()), RawImages(images, labels), schedule, 1),
    ]
    for other in others:
        said: list[str] = []
        with pytest.raises(Killed):
            fit(*other, killed_at(1), None, Checkpoint(tmp_path / "c", "r", say=said.append))
        assert len(said) == 1 and "other settings" in said[0]


def test_the_global_random_state_is_neither_used_nor_changed() -> None:
    images, labels = stripes(32)
    nets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        nets.append(network(dropout=0.5))
        fit(nets[-1], RawImages(images, labels), Schedule(epochs=1, batch_size=16, bf16=False), 0)
        assert torch.equal(torch.get_rng_state(), before)
    assert same(*nets)


def test_cudnn_stays_on_and_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, names = torch.backends.cudnn, ("enabled", "deterministic", "benchmark", "allow_tf32")
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(cudnn, "allow_tf32", False)
    before = [getattr(cudnn, name) for name in names]
    seen: list[list[bool]] = []
    fit(
        network(),
        RawImages(*stripes(64)),
        Schedule(1, 64),
        0,
        lambda *_: seen.append([getattr(cudnn, name) for name in names]),
    )
    assert seen == [[True, True, False, False]]
    assert [getattr(cudnn, name) for name in names] == before == [True, False, True, False]


def test_untrainable_networks_and_data_are_errors() -> None:
    images, labels = stripes(8)
    with pytest.raises(OptionError, match="8 images are less than one step of 16"):
        fit(network(), RawImages(images, labels), Schedule(epochs=1, batch_size=16), 0)
    with pytest.raises(OptionError, match="1 epoch and 1 image a step, not 0"):
        Schedule(epochs=0)
    with pytest.raises(TrainingError, match="The loss is nan after 1 steps"):
        net = network()
        net[6].weight.data.fill_(float("nan"))  # type: ignore[index, union-attr]
        fit(net, RawImages(images, labels), Schedule(epochs=1, batch_size=8, bf16=False), 0)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("peak_lr", [0.0, -0.1, math.nan, math.inf]),
        ("warmup", [-0.1, 1.0, math.nan]),
        ("momentum", [0.0, 1.0, -0.9, math.nan]),
        ("weight_decay", [-1e-4, math.nan]),
        ("padding", [-1]),
        ("decay", [-0.1, math.nan]),
    ],
)
def test_invalid_schedules_are_errors(name: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(OptionError, match=f"schedule's {name} is out of range: {value}"):
            Schedule(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [64, 32, 16, 8])
def test_a_cycle_may_have_any_number_of_steps(batch_size: int) -> None:
    """1, 2, 4 and 8 steps, of which a quarter rise: one step of four."""
    images, labels = stripes(64)
    seen: list[int] = []
    schedule = Schedule(epochs=1, batch_size=batch_size, bf16=False)
    fit(network(), RawImages(images, labels), schedule, 0, lambda step, *_: seen.append(step))
    assert seen == list(range(1, 64 // batch_size + 1))


def test_training_runs_on_every_device(device: str) -> None:
    images, labels = stripes()
    net = network().to(device)
    fit(net, RawImages(images, labels), Schedule(epochs=4, batch_size=32), 0)
    assert (net(images.to(device).float() / 255).argmax(1).cpu() == labels).float().mean() == 1
