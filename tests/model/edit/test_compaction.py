"""Compact networks compute what the whole ones compute, and keep what cannot go."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.errors import OptionError
from bdprune.files import description_path
from bdprune.model.architectures import build
from bdprune.model.channels import Channels
from bdprune.model.edit.compaction import Compacted, compact
from bdprune.model.edit.pruning import PruneMode, prune
from bdprune.model.handle import Model, Normalization
from bdprune.model.loading import load
from bdprune.model.saving import save

pytest.importorskip("torch_pruning")
Shake = Callable[[nn.Module, int], nn.Module]


def third(model: Model, seed: int = 0) -> dict[str, list[int]]:
    """A third of the filters of every group."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: sorted(torch.randperm(group.num_filters, generator=generator)[: group.num_filters // 3].tolist())
        for group in model.groups
    }


def compacted(model: Model, pruned: dict[str, list[int]], mode: PruneMode = "zero_gamma_beta") -> Compacted:
    """The compact model; its logits must be those of the pruned model in float64 up to the order of sums."""
    whole = prune(model, pruned, mode)
    found = compact(whole, pruned, torch.rand(8, *model.input_shape))
    images = torch.rand(6, *model.input_shape, dtype=torch.float64)
    expected, logits = (one.clone().module.double()(images).detach() for one in (whole, found.model))
    assert torch.allclose(logits, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))
    return found


def count(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.network.parameters())


def known(name: str, shake: Shake, width: int = 8, size: int = 16) -> Model:
    network = shake(build(name, 5, width=width), 1)
    return Model(network.eval(), name, 5, (3, size, size), Normalization((0.5,), (0.25,)))


class Gate(nn.Module):
    """Multiplies by the mean of all channels: zero stays zero, but the other channels depend on its being there."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean(1, keepdim=True)


class Net(nn.Module):
    """Two convs with anything between them."""

    def __init__(self, *between: nn.Module, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.between = nn.Sequential(*between)
        self.second = nn.Conv2d(8, 6, 3, padding=1, groups=groups)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.relu(self.second(self.between(self.first(x)))).mean((2, 3)))


def own(shake: Shake, *between: nn.Module, groups: int = 1) -> Model:
    return Model(shake(Net(*between, groups=groups), 2).eval(), "x:Net", 4, (3, 8, 8))


@pytest.mark.parametrize("mode", ["zero_gamma", "zero_gamma_beta", "weights"])
@pytest.mark.parametrize("name", ["resnet18_cifar", "mobilenet_v2_cifar"])
def test_the_logits_stay_and_filters_go(name: str, mode: PruneMode, shake: Shake) -> None:
    model = known(name, shake)
    found = compacted(model, third(model), mode)
    assert found.removed > 0 and count(found.model) < count(model)
    assert found.model.compact is not None and found.model.compact.arch == name
    assert model.compact is None


@pytest.mark.parametrize("name", ["plain_cnn", "vgg11_bn_cifar", "ibau_cnn"])
def test_networks_without_shortcuts_lose_every_pruned_filter(name: str, shake: Shake) -> None:
    model = known(name, shake, size=32)
    pruned = third(model)
    found = compacted(model, pruned)
    assert found.removed == sum(map(len, pruned.values())) and not found.left
    for group in model.groups:
        layer = found.model.network.get_submodule(group.conv)
        assert isinstance(layer, nn.Conv2d) and layer.out_channels == group.num_filters - len(pruned[group.name])


def test_filters_of_a_shortcut_go_only_if_all_that_are_added_are_pruned(shake: Shake) -> None:
    model = known("resnet18_cifar", shake)
    alone = compacted(model, {"layer1.0.conv2": [1, 5]})
    assert alone.removed == 0 and alone.model.compact is None
    assert alone.left["layer1.0.conv2"].startswith("2 of 2 pruned filters stay: ")
    pruned = {"conv1": [1, 3], "layer1.0.conv2": [1, 5], "layer1.1.conv2": [1]}
    found = compacted(model, pruned)
    assert found.removed == 3  # channel 1 of all three
    assert found.model.compact is not None
    assert found.model.compact.layers["layer2.0.conv1"].inputs == Channels(8, (0, 2, 3, 4, 5, 6, 7))
    assert set(found.left) == {"conv1", "layer1.0.conv2"}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.InstanceNorm2d(8, affine=True)])
def test_a_positive_constant_stays_and_a_negative_one_goes_through_relu(norm: nn.Module, shake: Shake) -> None:
    model = own(shake, norm, nn.ReLU())
    model.network.get_parameter("between.0.bias").data[:2] = torch.tensor([0.5, -0.5])
    found = compacted(model, {"first": [0, 1]}, "zero_gamma")
    assert found.removed == 1 and found.left["first"].startswith("1 of 2")
    assert found.model.compact is not None
    assert found.model.compact.layers["first"].outputs == Channels(8, (0, 2, 3, 4, 5, 6, 7))


def test_a_dead_filter_that_was_not_pruned_does_not_let_others_go(shake: Shake) -> None:
    """A sum with a filter that happens to be dead on all images is not always zero."""

    class Sum(Net):
        def __init__(self) -> None:
            super().__init__(nn.BatchNorm2d(8))
            self.other = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = functional.relu(self.between(self.first(x))) + functional.relu(self.other(x))
            return self.head(functional.relu(self.second(y)).mean((2, 3)))

    model = Model(shake(Sum(), 3).eval(), "x:Sum", 4, (3, 8, 8))
    model.network.get_parameter("other.bias").data[2] = -1e3
    assert compacted(model, {"first": [2]}).removed == 0


@pytest.mark.parametrize(
    ("between", "groups", "words"),
    [
        ((nn.GroupNorm(2, 8), nn.ReLU()), 1, "statistics of the norm between.0"),
        ((nn.Sigmoid(),), 1, "also read other values"),
        ((nn.ReLU(),), 2, "second is a Conv2d with groups"),
        ((nn.Softmax(1),), 1, "also read other values"),
        ((Gate(),), 1, "the logits would change"),
    ],
)
def test_what_cannot_go_stays_with_a_reason(between: Any, groups: int, words: str, shake: Shake) -> None:
    model = own(shake, *between, groups=groups)
    found = compacted(model, {"first": [0, 4]})
    assert found.removed == 0 and found.model.compact is None and count(found.model) == count(model)
    assert words in found.left["first"]


@pytest.mark.parametrize("between", [(), (nn.PReLU(8),), (nn.InstanceNorm2d(8), nn.GELU()), (nn.MaxPool2d(2),)])
def test_layers_of_one_channel_each_shrink(between: Any, shake: Shake) -> None:
    found = compacted(own(shake, *between), {"first": [0, 4, 7]})
    assert found.removed == 3


def test_a_forward_pass_with_fixed_channels_stays_whole(shake: Shake) -> None:
    class Fixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = functional.relu(self.first(x)).view(-1, 8, 8, 8)
            return self.head(functional.relu(self.second(y)).mean((2, 3)))

    model = Model(shake(Fixed(), 3).eval(), "x:Fixed", 4, (3, 8, 8))
    found = compacted(model, {"first": [1], "second": [2]})
    assert found.removed == 1 and "first" in found.left
    assert found.model.compact is not None and "second" in found.model.compact.layers


def test_a_layer_keeps_a_channel(shake: Shake) -> None:
    found = compacted(own(shake), {"first": list(range(8)), "second": [0]})
    assert found.removed == 1 and "all its channels" in found.left["first"]


def test_the_file_is_described_and_loads_again(shake: Shake, write: Callable[..., Path], tmp_path: Path) -> None:
    network = known("resnet18_cifar", shake, size=32).network.double()
    path = write({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}})
    model = load(path)
    found = compacted(model, third(model))
    written = save(found.model, tmp_path / "out.pth")
    assert written.description == description_path(written.path) and written.description.exists()
    content = torch.load(written.path, weights_only=True)
    assert content["epoch"] == 3 and content["state_dict"]["module.conv1.weight"].dtype == torch.float64
    again = load(written.path)
    images = torch.rand(4, 3, 32, 32)
    assert torch.equal(again.module(images), replace_normalization(found.model, again).module(images))
    assert again.compact == found.model.compact and again.arch == "resnet18_cifar"


def replace_normalization(model: Model, other: Model) -> Model:
    return Model(model.network, model.arch, model.num_classes, model.input_shape, other.normalization)


def test_a_compact_network_can_be_pruned_again(shake: Shake, tmp_path: Path) -> None:
    model = known("vgg11_bn_cifar", shake, size=32)
    once = compacted(model, {"features.0": [0, 2]}).model
    save(once, tmp_path / "once.safetensors")
    twice = compacted(load(tmp_path / "once.safetensors"), {"features.0": [1]}).model
    assert twice.compact is not None
    assert twice.compact.layers["features.0"].outputs == Channels(8, (1, 4, 5, 6, 7))
    save(twice, tmp_path / "twice.safetensors")
    assert load(tmp_path / "twice.safetensors").compact == twice.compact


def test_a_whole_network_gets_no_description(shake: Shake, tmp_path: Path) -> None:
    written = save(known("plain_cnn", shake), tmp_path / "m.safetensors")
    assert written.description is None and list(tmp_path.iterdir()) == [written.path]


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, shake: Shake) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(OptionError, match="needs Torch-Pruning") as raised:
        compact(own(shake), {"first": [0]}, torch.rand(2, 3, 8, 8))
    assert "pip install torch-pruning" in raised.value.hint
