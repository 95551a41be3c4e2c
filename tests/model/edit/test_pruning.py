"""Pruning compared with the definition of each mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.errors import OptionError
from bdprune.model.architectures import build
from bdprune.model.edit.mask import MaskedNetwork
from bdprune.model.edit.pruning import MODES, PruneMode, prune
from bdprune.model.handle import Model


def outputs(model: Model, module: str, x: Tensor) -> Tensor:
    """The output of ``module`` in one forward pass."""
    seen: list[Tensor] = []
    hook = model.network.get_submodule(module).register_forward_hook(lambda *call: seen.append(call[2]))
    model.module(x)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_gives_the_documented_output(small_model: Model, mode: PruneMode) -> None:
    pruned = prune(small_model, {"features.3": [1]}, mode)
    x = torch.rand(3, 3, 8, 8)
    y = outputs(pruned, "features.4", x)
    beta = small_model.network.get_parameter("features.4.bias")[1] if mode == "zero_gamma" else torch.tensor(0.0)
    assert torch.equal(y[:, 1], beta.expand_as(y[:, 1]))
    assert torch.equal(y[:, 0], outputs(small_model, "features.4", x)[:, 0])
    weight = pruned.network.get_parameter("features.3.weight")
    assert (not weight[1].any()) == (mode == "weights") and weight[0].any()
    assert (pruned.network.get_parameter("features.3.bias")[1] == 0) == (mode == "weights")


def test_all_other_weights_stay(small_model: Model) -> None:
    pruned = prune(small_model, {"features.3": [0], "features.16": [2, 5], "features.0": []}, "weights")
    touched = {f"features.{index}.{name}" for index in (3, 4, 16, 17) for name in ("weight", "bias")}
    before, after = small_model.network.state_dict(), pruned.network.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == touched
    assert (pruned.arch, pruned.num_classes, pruned.artifact) == ("ibau_cnn", 4, small_model.artifact)


def test_zero_gamma_equals_a_mask_of_zero() -> None:
    torch.manual_seed(0)
    model = Model(build("resnet18_cifar", 3, width=4).eval(), "resnet18_cifar", 3, (3, 32, 32))
    filters = {"conv1": [0], "layer2.0.shortcut.0": [1, 3], "layer4.1.conv2": [5]}
    masked = MaskedNetwork(model).eval()
    with torch.no_grad():
        for name, indices in filters.items():
            masked.masks[name][indices] = 0
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(prune(model, filters).module(x), masked(x))


@pytest.mark.parametrize("mode", MODES)
def test_filters_without_a_norm_lose_filter_and_bias(mode: PruneMode) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(functional.relu(self.conv(x))).mean((2, 3))  # type: ignore[no-any-return]

    model = Model(Plain().eval(), "own", 2, (3, 8, 8))
    pruned = prune(model, {"conv": [1, 2], "last": [0]}, mode)
    x = torch.rand(1, 3, 8, 8)
    y = outputs(pruned, "conv", x)
    assert not y[:, 1:3].any() and torch.equal(y[:, [0, 3]], outputs(model, "conv", x)[:, [0, 3]])
    assert pruned.module(x)[0, 0] == 0


def test_one_norm_over_several_convs_is_cut_at_the_offset() -> None:
    model = Model(build("densenet121", 3, width=4).eval(), "densenet121", 3, (3, 64, 64))
    group = next(group for group in model.groups if group.norm and group.norm.start > 0)
    pruned = prune(model, {group.name: [1]})
    assert group.norm is not None
    gamma = pruned.network.get_parameter(f"{group.norm.name}.weight")
    assert (gamma == 0).nonzero().flatten().tolist() == [group.norm.start + 1]


@pytest.mark.parametrize(
    ("filters", "mode", "message"),
    [
        ({"features.1": [0]}, "zero_gamma", "no filter group 'features.1'"),
        ({"features.0": [2]}, "zero_gamma", "features.0 has no filter 2"),
        ({"features.0": [-1]}, "zero_gamma", "no filter -1"),
        ({}, "hard", "'hard'"),
    ],
)
def test_wrong_requests_are_errors(small_model: Model, filters: Any, mode: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        prune(small_model, filters, mode)
    assert caught.value.hint


@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_never_changed(
    small_model: Model, fingerprint: Callable[[nn.Module], str], mode: PruneMode
) -> None:
    before = fingerprint(small_model.network)
    pruned = prune(small_model, {group.name: [0] for group in small_model.groups}, mode)
    assert fingerprint(small_model.network) == before != fingerprint(pruned.network)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of every pixel, as in ConvNeXt."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Permuted(nn.Module):
    """The same with a layer norm of the last dimension, whose channels the trace cannot follow."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def with_norm(norm: nn.Module) -> Model:
    """A conv with a bias, a norm with random scales and shifts, and a head."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return Model(network.eval(), "x", 2, (3, 8, 8))


OWN_STATISTICS = [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), LayerNorm2d(4)]


@pytest.mark.parametrize("norm", OWN_STATISTICS)
@pytest.mark.parametrize("mode", MODES)
def test_norms_with_statistics_of_each_image_output_beta_or_zero(norm: nn.Module, mode: PruneMode) -> None:
    model = with_norm(norm)
    x = torch.rand(3, 3, 8, 8)
    pruned = prune(model, {"0": [1]}, mode)
    before, after = outputs(model, "1", x), outputs(pruned, "1", x)
    beta = model.network.get_parameter("1.bias")[1] if mode == "zero_gamma" else torch.tensor(0.0)
    assert torch.equal(after[:, 1], beta.expand_as(after[:, 1]))
    others = torch.equal(after[:, [0, 2, 3]], before[:, [0, 2, 3]])
    assert others == (mode != "weights" or isinstance(norm, nn.InstanceNorm2d)), "only weights moves the statistics"


@pytest.mark.parametrize("norm", OWN_STATISTICS)
def test_a_mask_scales_what_such_a_norm_gives(norm: nn.Module) -> None:
    """A mask on the conv would be lost: the norm divides it out again."""
    model = with_norm(norm)
    masked = MaskedNetwork(model)
    with torch.no_grad():
        masked.masks["0"][1] = 0.5
        half = model.clone()
        half.network.get_parameter("1.weight")[1] *= 0.5
    x = torch.rand(3, 3, 8, 8)
    assert torch.allclose(masked(x), half.module(x), atol=1e-6)
    assert not torch.allclose(masked(x), model.module(x), atol=1e-3)
    with torch.no_grad():
        masked.masks["0"][1] = 0
    assert torch.allclose(masked(x), prune(model, {"0": [1]}).module(x), atol=1e-6)


@pytest.mark.parametrize("norm", [Permuted(4), nn.GroupNorm(2, 4, affine=False), nn.Identity()])
@pytest.mark.parametrize("mode", MODES)
def test_without_a_norm_that_the_trace_follows_the_conv_is_zeroed(norm: nn.Module, mode: PruneMode) -> None:
    model = with_norm(norm)
    pruned = prune(model, {"0": [1]}, mode)
    x = torch.rand(3, 3, 8, 8)
    assert not outputs(pruned, "0", x)[:, 1].any()
    before, after = (outputs(one, "1", x)[:, [0, 2, 3]] for one in (model, pruned))
    assert torch.equal(before, after) == isinstance(norm, nn.Identity), "the statistics of the other channels change"
    masked = MaskedNetwork(model)
    with torch.no_grad():
        masked.masks["0"][1] = 0
    assert torch.allclose(masked(x), pruned.module(x), atol=1e-6)


@pytest.mark.parametrize("norm", OWN_STATISTICS)
def test_masks_get_gradients_in_both_layouts(norm: nn.Module) -> None:
    """The input of the first norm needs no gradient, which crashes PyTorch for group norm in channels-last."""
    model = with_norm(norm)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        masked = MaskedNetwork(model).to(memory_format=layout)  # type: ignore[call-overload]
        images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
        masked(images)[:, 0].sum().backward()
        gradients.append(masked.masks["0"].grad)
    assert gradients[0].any() and torch.allclose(*gradients, atol=1e-5)
