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
