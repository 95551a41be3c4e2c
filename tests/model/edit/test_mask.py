"""Masks compared with the definition, computed by hand in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.model.architectures import build
from bdprune.model.edit.mask import MaskedNetwork
from bdprune.model.handle import Model, Normalization


class Plain(nn.Module):
    """conv (with bias) -> relu -> conv -> norm -> mean: one conv without and one with a norm."""

    def __init__(self, kind: type[nn.Conv2d] = nn.Conv2d, **settings: Any) -> None:
        super().__init__()
        self.first = kind(3, 4, 3, **settings)
        self.second = nn.Conv2d(4, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(functional.relu(self.first(x)))).mean((2, 3))  # type: ignore[no-any-return]


class Standardised(nn.Conv2d):
    """A conv with its own forward pass."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.conv2d(input, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def model_of(network: nn.Module, size: int = 8) -> Model:
    return Model(network.eval(), "own", 2, (3, size, size))


def set_masks(masked: MaskedNetwork, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mask in masked.masks.values():
            mask.copy_(torch.rand(mask.shape, generator=generator))
    return {name: mask.detach().double() for name, mask in masked.masks.items()}


@pytest.mark.parametrize("training", [False, True])
def test_masks_by_hand(shake: Callable[[nn.Module, int], nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    network = shake(Plain(), 1)
    assert isinstance(network, Plain)
    masked = MaskedNetwork(model_of(network)).train(training)
    masks = set_masks(masked)
    x = torch.rand(6, 3, 8, 8)
    y = functional.conv2d(x.double(), network.first.weight.double(), network.first.bias.double())  # type: ignore[union-attr]
    y = functional.relu(y * masks["first"].view(1, -1, 1, 1))
    z = functional.conv2d(y, network.second.weight.double())
    mean, variance = network.norm.running_mean, network.norm.running_var
    assert mean is not None and variance is not None
    if training:
        mean, variance = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)
    scale = network.norm.weight.double() * masks["second"] / (variance.double() + 1e-5).sqrt()
    shift = network.norm.bias.double()
    expected = (z - mean.double().view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    assert torch.allclose(masked(x).double(), expected.mean((2, 3)), atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1},
        {"padding": "same"},
        {"padding": "valid"},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": (2, 1), "padding_mode": "circular", "stride": (2, 1)},
        {"dilation": 2, "bias": False, "stride": 1},
        {"kind": Standardised},
    ],
)
def test_a_conv_without_a_norm_is_masked_after_its_bias(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = Plain(**settings)
    model = model_of(network, 12)
    masked = MaskedNetwork(model)
    mask = set_masks(masked)["first"].float()
    seen: list[Tensor] = []
    masked.network.get_submodule("network.first").register_forward_hook(lambda *call: seen.append(call[2]))
    x = torch.rand(2, 3, 12, 12)
    masked(x)
    assert torch.allclose(seen[0], network.first(x) * mask.view(1, -1, 1, 1), atol=1e-6)


def test_one_norm_over_several_convs_takes_each_mask_at_its_offset() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.cat([self.a(x), x, self.b(x)], 1)).mean((2, 3))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    network = Joined()
    masked = MaskedNetwork(Model(network.eval(), "own", 8, (3, 4, 4)))
    masks = set_masks(masked)
    x = torch.rand(2, 3, 4, 4)
    factors = torch.cat([masks["a"], torch.ones(3), masks["b"]]).float()
    assert torch.allclose(masked(x), network(x) * factors, atol=1e-6)  # the shift of a new norm is zero


@pytest.mark.parametrize("name", ["resnet18_cifar", "preact_resnet18", "mobilenet_v2_cifar", "densenet121_cifar"])
def test_masks_of_one_change_nothing_and_only_masks_are_trainable(name: str) -> None:
    torch.manual_seed(0)
    network = build(name, 3, width=8).eval()
    model = Model(network, name, 3, (3, 32, 32), Normalization((0.5,) * 3, (0.25,) * 3))
    masked = MaskedNetwork(model).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(masked(x), model.module(x), atol=1e-6)
    assert list(masked.masks) == [group.name for group in model.groups]
    learnable = [parameter for parameter in masked.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in learnable} == {id(mask) for mask in masked.masks.values()}
    masked.train()(x).square().sum().backward()
    assert all(mask.grad is not None and mask.grad.isfinite().all() for mask in masked.masks.values())
    assert all(p.grad is None for p in masked.network.parameters())


def test_gradients_of_masks_match_finite_differences(shake: Callable[[nn.Module, int], nn.Module]) -> None:
    torch.manual_seed(0)
    masked = MaskedNetwork(model_of(shake(Plain(), 2))).double()
    set_masks(masked)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    masked(x).square().sum().backward()
    for mask in masked.masks.values():
        assert mask.grad is not None
        for index in range(len(mask)):
            with torch.no_grad():
                values = []
                for step in (1e-6, -2e-6, 1e-6):
                    mask[index] += step
                    values.append(masked(x).square().sum())
            assert abs((values[0] - values[1]) / 2e-6 - mask.grad[index]) < 1e-5


def test_the_model_is_never_changed(fingerprint: Callable[[nn.Module], str], small_model: Model) -> None:
    before = fingerprint(small_model.network)
    masked = MaskedNetwork(small_model).train()
    optimizer = torch.optim.SGD(masked.masks.values(), lr=1.0)
    masked(torch.rand(8, 3, 8, 8)).sum().backward()
    optimizer.step()
    masked.clamp_()
    assert fingerprint(small_model.network) == before
    drifted = masked.network.get_buffer("network.features.1.running_mean")
    assert not torch.equal(drifted, small_model.network.get_buffer("features.1.running_mean"))


def test_clamping_returns_masks_to_the_unit_interval(small_model: Model) -> None:
    masked = MaskedNetwork(small_model)
    first = next(iter(masked.masks.values()))
    with torch.no_grad():
        first.copy_(torch.tensor([-1.0, 2.0]))
    assert masked.clamp_() is masked
    assert first.tolist() == [0.0, 1.0]


def test_copies_have_their_own_masks(small_model: Model) -> None:
    masked = MaskedNetwork(small_model).eval()
    twin = copy.deepcopy(masked)
    with torch.no_grad():
        for mask in twin.masks.values():
            mask.zero_()
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(masked(x), small_model.module(x)) and not torch.equal(twin(x), masked(x))


def test_a_conv_that_is_called_functionally_is_masked_too() -> None:
    class Functional(Plain):
        def forward(self, x: Tensor) -> Tensor:
            first = functional.conv2d(x, self.first.weight, self.first.bias)
            return self.norm(self.second(functional.relu(first))).mean((2, 3))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    network = Functional()
    masked = MaskedNetwork(model_of(network)).double().eval()
    network.double()
    masks = set_masks(masked)
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    first = network.first(images) * masks["first"].view(1, -1, 1, 1)
    features = network.second(functional.relu(first))
    scale = (network.norm.weight * masks["second"]).detach() / (network.norm.running_var + network.norm.eps).sqrt()
    shift = network.norm.bias - network.norm.running_mean * scale
    expected = (features * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).mean((2, 3))
    result = masked(images)
    assert torch.allclose(result, expected, atol=1e-6)
    result.sum().backward()
    assert masked.masks["first"].grad is not None
