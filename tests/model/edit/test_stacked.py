"""A stack gives the results of its networks, and rejects networks that cannot be stacked."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from bdprune.model.architectures import REGISTRY, build
from bdprune.model.edit.mask import MaskedNetwork
from bdprune.model.edit.stacked import StackedBatchNorm2d, StackedNetwork, agrees, why_not
from bdprune.model.handle import Model, Normalization

SHAPE = (3, 8, 8)


def network(seed: int, norm: bool = True) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stem = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.ReLU()]
        body = [nn.Conv2d(6, 4, 3, stride=2, padding=1, padding_mode="reflect", bias=False), nn.ReLU()]
        module = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
        for child in module:
            if isinstance(child, nn.BatchNorm2d):
                child.running_mean.normal_()
                nn.init.uniform_(child.weight, 0.5, 2)
        return module.eval()


def models(count: int = 3, make: Callable[[int], nn.Module] = network) -> list[Model]:
    found = []
    for seed in range(count):
        normalization = Normalization((0.1 * seed,) * 3, (0.5,) * 3) if seed else Normalization()
        found.append(Model(make(seed), "small", 3, SHAPE, normalization))
    return found


def images(count: int = 5) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_logits_and_gradients_equal_those_of_the_models(
    layout: torch.memory_format, training: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    alone = [model.with_network(model.network.to(device)) for model in models()]
    near = {} if device == "cpu" else {"rtol": 1e-4, "atol": 1e-4}
    stacked = StackedNetwork(alone).train(training)
    stacked.arrange(layout == torch.channels_last)
    batch = images().to(device).contiguous(memory_format=layout)
    logits = stacked(batch)
    logits.square().sum().backward()
    for g, model in enumerate(alone):
        own = model.clone()
        module = own.module.train(training).to(memory_format=layout)
        one = module(batch)
        torch.testing.assert_close(logits[g], one, **near)
        one.square().sum().backward()
        after = stacked.model(g).network.state_dict()
        for name, value in own.network.state_dict().items():
            torch.testing.assert_close(after[name], value, **near)
        for name, parameter in own.network.named_parameters():
            torch.testing.assert_close(stacked.network.get_parameter(name).grad[g], parameter.grad, **near)


def test_models_are_unchanged_and_restored_exactly() -> None:
    alone = models()
    before = [{name: value.clone() for name, value in model.network.state_dict().items()} for model in alone]
    stacked = StackedNetwork(alone).train()
    stacked(images())
    for model, state in zip(alone, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.network.state_dict().items())
    again = StackedNetwork(alone).model(1)
    assert again.normalization == alone[1].normalization and not again.network.training
    assert all(torch.equal(value, before[1][name]) for name, value in again.network.state_dict().items())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_joint_norms_equal_separate_norms(training: bool) -> None:
    norms = [module for seed in range(3) for module in network(seed) if isinstance(module, nn.BatchNorm2d)]
    stacked = [
        module
        for module in StackedNetwork(models()).train(training).modules()
        if isinstance(module, StackedBatchNorm2d)
    ]
    norm, twin = stacked[0], StackedNetwork(models()).train(training).network.get_submodule("1")
    x = torch.randn(6, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    for layout in (torch.contiguous_format, torch.channels_last):
        batch = x.contiguous(memory_format=layout)
        torch.testing.assert_close(norm._jointly(batch), twin._in_turn(batch))
        torch.testing.assert_close(norm.running_var, twin.running_var)
    expected = norms[1].train(training)(x[2:4])
    fresh = StackedNetwork(models()).train(training).network.get_submodule("1")
    torch.testing.assert_close(fresh(x)[2:4], expected)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "bare_convs"])
def test_a_masked_stack_equals_masked_networks(norm: bool) -> None:
    alone = models(make=lambda seed: network(seed, norm))
    masked = MaskedNetwork(StackedNetwork(alone))
    batch = images()
    with torch.no_grad():
        for name, mask in masked.masks.items():
            assert mask.shape[0] == 3
            mask.copy_(torch.rand(mask.shape, generator=torch.Generator().manual_seed(len(name))))
    logits = masked(batch)
    logits.square().sum().backward()
    for g, model in enumerate(alone):
        one = MaskedNetwork(model)
        with torch.no_grad():
            for name, mask in one.masks.items():
                mask.copy_(masked.masks[name][g])
        torch.testing.assert_close(logits[g], one(batch))
        one(batch).square().sum().backward()
        for name, mask in one.masks.items():
            torch.testing.assert_close(masked.masks[name].grad[g], mask.grad)
    torch.testing.assert_close(masked(batch), logits)  # the first pass leaves no state


def storage(values: Iterable[Tensor]) -> int:
    """Bytes of memory behind the values, each piece counted once."""
    pieces = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in values}
    return sum(pieces.values())


def test_a_model_given_several_times_has_one_copy_of_frozen_weights() -> None:
    one, other = models(2)
    alone = storage(one.network.parameters())
    frozen = StackedNetwork([one] * 3, frozen=True)
    for layout in (False, True, False):
        frozen.arrange(channels_last=layout)
        assert storage(frozen.parameters()) == alone
        assert all(len(value) == 3 and not value.requires_grad for value in frozen.parameters())
    assert not {value.data_ptr() for value in frozen.parameters()} & {p.data_ptr() for p in one.network.parameters()}
    assert storage(frozen.buffers()) == 3 * storage(one.network.buffers())
    assert storage(StackedNetwork([one] * 3).parameters()) == 3 * alone
    assert storage(StackedNetwork([one, other, one], frozen=True).parameters()) == 3 * alone
    back = frozen.model(2).network.state_dict()
    assert all(torch.equal(value, back[name]) for name, value in one.network.state_dict().items())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "bare_convs"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_masks_on_one_copy_equal_masks_on_several_copies(
    norm: bool, training: bool, channels_last: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    (model,) = models(1, make=lambda seed: network(seed, norm).to(device))
    stacks = [StackedNetwork([model] * 3, frozen=frozen) for frozen in (True, False)]
    for stacked in stacks:
        stacked.arrange(channels_last)
    found = [MaskedNetwork(stacked).train(training) for stacked in stacks]
    for masked in found:
        for name, mask in masked.masks.items():
            mask.data.uniform_(generator=torch.Generator(device).manual_seed(len(name)))
    shared, copied = (masked(images().to(device)) for masked in found)
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(shared, copied, **near)
    assert not torch.allclose(shared[0], shared[1])
    for logits in (shared, copied):
        logits.square().sum().backward()
    for name, mask in found[1].masks.items():
        torch.testing.assert_close(found[0].masks[name].grad, mask.grad, **near)
    for ours, theirs in zip(found[0].buffers(), found[1].buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **near)


STACKED = ("resnet18_cifar", "resnet20_cifar", "preact_resnet18", "wrn_16_1", "vgg16_bn_cifar", "densenet121_cifar")


@pytest.mark.parametrize("name", STACKED)
def test_architectures_are_stacked(name: str) -> None:
    entry = REGISTRY[name]
    alone = []
    for seed in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            small = build(name, 4, width=max(entry.width // 16, 1)).eval()
        alone.append(Model(small, name, 4, (3, 32, 32)))
    assert why_not(alone) == ""
    assert agrees(StackedNetwork(alone))


def refused(change: Callable[[list[Model]], None]) -> str:
    found = models(2)
    change(found)
    return why_not(found)


def test_networks_that_cannot_be_stacked_are_errors_with_a_reason() -> None:
    def other_shape(found: list[Model]) -> None:
        found[1].network[3] = nn.Conv2d(6, 5, 3)

    def other_kind(found: list[Model]) -> None:
        found[1] = Model(nn.Conv2d(3, 3, 1), "conv", 3, SHAPE)

    def dropout(found: list[Model]) -> None:
        found[0].network[2] = nn.Dropout(0.5)

    def layer_norm(found: list[Model]) -> None:
        for model in found:
            model.network[1] = nn.GroupNorm(2, 6)

    def cumulative(found: list[Model]) -> None:
        for model in found:
            model.network[1].momentum = None

    assert "differ in shape" in refused(other_shape)
    assert "conv is not a small" in refused(other_kind)
    assert "2 uses random numbers" in refused(dropout)
    assert "1 has parameters in a layer type" in refused(layer_norm)
    assert "1 keeps no running average" in refused(cumulative)
    with pytest.raises(ValueError, match="cannot be stacked: 2 uses random numbers"):
        found = models(2)
        dropout(found)
        StackedNetwork(found)


class ByWeight(nn.Module):
    """Uses only the weight of a conv, which a stack cannot detect."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.conv2d(x, self.conv.weight).mean((2, 3)))


class OverTheBatch(nn.Sequential):
    """Centres its logits over the images; a stack would do so over the images of all models."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits - logits.mean(0)


def test_side_computations_of_a_forward_pass_are_detected() -> None:
    by_weight = [Model(ByWeight().eval(), "by_weight", 3, SHAPE) for _ in range(2)]
    assert why_not(by_weight) == "" and not agrees(StackedNetwork(by_weight))
    centred = models(2, make=lambda seed: OverTheBatch(*network(seed)).eval())
    assert why_not(centred) == "" and not agrees(StackedNetwork(centred))
    assert agrees(StackedNetwork(models(2)))


def test_agreement_is_checked_without_tf32_and_tf32_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    stacked, seen = StackedNetwork(models()), list[bool]()
    stacked.register_forward_pre_hook(lambda *call: seen.append(torch.backends.cudnn.allow_tf32))
    assert agrees(stacked) and seen == [False] and torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(StackedNetwork, "forward", lambda *call: 1 / 0)
    assert not agrees(stacked) and torch.backends.cudnn.allow_tf32
