from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdprune.errors import OptionError
from bdprune.loops.predictions import PrunedPredictions
from bdprune.model.architectures import build
from bdprune.model.edit.program import Program
from bdprune.model.edit.pruning import MODES, PruneMode, prune
from bdprune.model.handle import Model
from bdprune.runtime.evaluate import predict


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def network(arch: str, **settings: Any) -> Model:
    """Untrained, with norms that are not the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build(arch, 10, **settings).eval()
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias, 0, 0.1)
    return Model(module, arch, 10, (3, 32, 32))


def prunings(model: Model, order: Sequence[int], share: int = 2) -> list[dict[str, list[int]]]:
    """Nothing, then one group after another, each with every ``share``-th filter; groups by their index."""
    steps: list[dict[str, list[int]]] = [{}]
    for index in order:
        group = model.groups[index]
        steps.append(steps[-1] | {group.name: list(range(0, group.num_filters, share))})
    return steps


class Counted(Program):
    """Counts the steps that were run."""

    ran = 0

    def run(self, images: Tensor, start: Any = None, keep: Any = ()) -> Any:
        type(self).ran += len(self) - (start.position if start else 0)
        return super().run(images, start, keep)


def assert_plain(model: Model, steps: list[dict[str, list[int]]], mode: PruneMode, cache_bytes: int) -> bool:
    sets = [images(20), images(7, seed=1)]
    predictions = PrunedPredictions(model, sets, steps, mode, cache_bytes)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    for step, pruned in enumerate(steps):
        for index in range(2 if step % 3 else 1):  # the second set is skipped sometimes, as in a sweep
            expected = predict(prune(model, pruned, mode).module, sets[index])
            assert torch.equal(predictions.predict(step, index), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
    return predictions._program is not None


@pytest.mark.parametrize("mode", MODES)
def test_predictions_equal_plain_pruning(mode: PruneMode) -> None:
    model = network("resnet18_cifar", width=4)
    steps = prunings(model, [18, 12, 16, 3, 19, 7])
    assert assert_plain(model, steps, mode, 1 << 30)
    assert assert_plain(model, steps, mode, 300_000)
    assert assert_plain(model, steps, mode, 0)


@pytest.mark.parametrize(
    ("arch", "width"), [("preact_resnet18", 4), ("mobilenet_v2_cifar", 4), ("densenet121_cifar", 4)]
)
def test_predictions_equal_plain_pruning_on_other_networks(arch: str, width: int) -> None:
    model = network(arch, width=width)
    last = len(model.groups) - 1
    assert assert_plain(model, prunings(model, [last, last // 2, last - 1, 1]), "zero_gamma", 1 << 30)


def test_filters_that_a_later_step_restores_are_unpruned() -> None:
    model = network("resnet18_cifar", width=4)
    grown = prunings(model, [18, 5, 12])
    assert_plain(model, [*grown, *reversed(grown)], "zero_gamma_beta", 1 << 30)


def test_predictions_start_at_the_first_changed_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("resnet18_cifar", width=4)
    monkeypatch.setattr("bdprune.loops.predictions.Program", Counted)
    steps = prunings(model, [19, 18, 17, 16])
    ran = []
    for cache_bytes in (1 << 30, 0):
        predictions = PrunedPredictions(model, [images(4)], steps, "zero_gamma", cache_bytes)
        Counted.ran = 0
        for step in range(len(steps)):
            predictions.predict(step, 0)
        ran.append(Counted.ran)
    assert ran[0] < 0.5 * ran[1]


def test_the_memory_stays_within_its_limit() -> None:
    model = network("resnet18_cifar", width=4)
    steps = prunings(model, [18, 12, 7, 3])
    for bound in (0, 100_000, 1_000_000):
        predictions = PrunedPredictions(model, [images(20)], steps, "zero_gamma", bound)
        for step in range(len(steps)):
            predictions.predict(step, 0)
            held = sum(state.nbytes for states in predictions._states.values() for state in states)
            assert held + predictions._free == bound
            assert held <= bound


class Branching(nn.Module):
    """Its forward pass depends on the images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).mean((2, 3))
        return y if y.sum() > 0 else -y


class Alone(nn.Module):
    """Never reads the bias, which is pruned with the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, self.conv.weight).mean((2, 3))


class Alias(nn.Module):
    """Adds in place to a tensor with another name, which tracing takes for an ordinary sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = name = self.one(x)
        y += self.two(y)
        return (y * name).mean((2, 3))


@pytest.mark.parametrize("kind", [Branching, Alone, Alias])
def test_unsupported_networks_fall_back_to_plain_passes(kind: type[nn.Module]) -> None:
    model = Model(kind().eval(), "own", 8, (3, 32, 32))
    assert not assert_plain(model, prunings(model, [0]), "zero_gamma", 1 << 30)


def test_an_overwritten_shortcut_is_handled() -> None:
    class Over(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            return y.add_(self.two(y)).mean((2, 3))  # type: ignore[no-any-return]

    model = Model(Over().eval(), "own", 8, (3, 32, 32))
    name = model.groups[1].name
    assert assert_plain(model, [{}, {name: [0]}, {name: [0, 1]}, {name: [0, 1, 2]}], "zero_gamma", 1 << 30)


def test_unknown_group_is_an_error() -> None:
    model = network("resnet18_cifar", width=4)
    with pytest.raises(OptionError, match="no filter group"):
        PrunedPredictions(model, [images(2)], [{}, {"nothing": [0]}], "zero_gamma")
