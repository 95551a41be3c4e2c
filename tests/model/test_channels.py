"""Removing channels from tensors, shapes and layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bdprune.model.channels import Channels, Compact, LayerChannels, full_shapes, narrow_, narrowed, sizes

OUT = LayerChannels(outputs=Channels(4, (0, 3)))
BOTH = LayerChannels(Channels(4, (1,)), Channels(3, (0, 2)))


def test_the_first_dimension_counts_outputs_and_the_second_inputs() -> None:
    weight = torch.arange(24.0).view(4, 3, 2)
    assert torch.equal(narrowed(weight, BOTH), weight[[1]][:, [0, 2]])
    assert torch.equal(narrowed(torch.arange(4), BOTH), torch.tensor([1]))
    assert torch.equal(narrowed(torch.tensor(7), OUT), torch.tensor(7))


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(3, 4, 1), (4, 3)),
        (nn.Conv2d(4, 4, 3, groups=4), (4, 0)),
        (nn.Conv2d(4, 4, 3, groups=2), None),
        (nn.Linear(3, 4), (4, 3)),
        (nn.BatchNorm2d(4), (4, 0)),
        (nn.InstanceNorm2d(4), (4, 0)),
        (nn.PReLU(4), (4, 0)),
        (nn.GroupNorm(2, 4), None),
        (nn.LayerNorm(4), None),
        (nn.ReLU(), None),
    ],
)
def test_which_layers_can_lose_channels(layer: nn.Module, size: tuple[int, int] | None) -> None:
    assert sizes(layer) == size


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True), nn.PReLU(4)],
)
def test_layers_with_one_side_run_with_the_kept_channels(layer: nn.Module) -> None:
    network = nn.Sequential(layer).eval()
    images = torch.randn(2, 4, 5, 5)
    expected = network(images)[:, [0, 3]]
    narrow_(network, {"0": OUT})
    assert torch.equal(network(images[:, [0, 3]]), expected)


def test_a_conv_and_a_linear_layer_lose_outputs_and_inputs() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2)).eval()
    narrow_(network, {"0": BOTH, "2": LayerChannels(inputs=Channels(4, (1,)))})
    conv, linear = network[0], network[2]
    assert (conv.out_channels, conv.in_channels, linear.in_features, linear.out_features) == (1, 2, 1, 2)
    assert network(torch.rand(5, 2, 1, 1)).shape == (5, 2)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"9": OUT}, "9 is not a layer"),
        ({"1": OUT}, "1 is not a layer"),
        ({"0": LayerChannels(Channels(5, (0,)))}, "0 has 4 channels, not 5"),
        ({"2": LayerChannels(inputs=Channels(1, (0,)))}, "2 has 0 channels, not 1"),
    ],
)
def test_impossible_removals_are_refused(layers: dict[str, LayerChannels], words: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=words):
        narrow_(network, layers)


def test_full_shapes_undo_the_removal_or_refuse_other_shapes() -> None:
    shapes = {"a.weight": (1, 2, 3, 3), "a.bias": (1,), "b.weight": (7,), "a.count": ()}
    full = full_shapes(shapes, {"a": BOTH})
    assert full == {"a.weight": (4, 3, 3, 3), "a.bias": (4,), "b.weight": (7,), "a.count": ()}
    assert full_shapes({"a.weight": (2, 2, 3, 3)}, {"a": BOTH}) is None


def test_a_second_removal_counts_in_the_original_channels() -> None:
    first = Compact("x", {"a": OUT, "b": OUT})
    both = first.then({"a": LayerChannels(Channels(2, (1,)), Channels(9, (4,))), "c": OUT})
    assert both.layers["a"] == LayerChannels(Channels(4, (3,)), Channels(9, (4,)))
    assert both.layers["b"] == both.layers["c"] == OUT and both.arch == "x"
