"""Soft masks of weights under a universal perturbation, compared with the formula on plain layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from bdprune.errors import ArchitectureError, OptionError, TrainingError
from bdprune.loops.soft_mask import SoftMasks, SoftMaskSettings, soft_masks
from bdprune.model.handle import Model
from bdprune.runtime.batches import passes

from ..helpers import broken

SETTINGS = SoftMaskSettings(epochs=2, passes=1, batch_size=60, padding=0)


def last(model: Model, data: Any, settings: SoftMaskSettings, seed: int = 0) -> SoftMasks:
    return soft_masks(model, data, settings, seed, precision="float32")


def test_a_step_is_that_of_the_paper(bright: Any) -> None:
    """One step of the perturbation, its projection, and the first step of Adam: lr times the sign of the gradient."""
    settings = SoftMaskSettings(
        epochs=1, passes=1, batch_size=240, padding=0, lr=0.1, alpha=0.3, radius=20.0, sparsity=1e-5
    )
    found = last(bright.model, bright.data, settings, seed=4)
    generator, network = torch.Generator().manual_seed(4), bright.model.network
    shuffled = [
        next(iter(next(iter(passes(bright.data, 1, 240, 0, generator, torch.device("cpu")))))) for _ in range(2)
    ]
    (images, _), (others, labels) = shuffled
    shift = torch.zeros(3, 8, 8, requires_grad=True)
    predicted = network(images).argmax(1)
    (up,) = torch.autograd.grad(functional.cross_entropy(network((images + shift).clamp(0, 1)), predicted), shift)
    shift = 10 * up
    radius = 20 * 192 / 3072
    assert shift.abs().sum() > radius, "the projection must matter"
    shift = shift * radius / shift.abs().sum()
    weights = {name: network.get_parameter(name).detach() for name in ("0.weight", "3.weight")}
    masks = {name: torch.ones_like(value, requires_grad=True) for name, value in weights.items()}
    masked = {name: masks[name] * value for name, value in weights.items()}
    moved = functional.cross_entropy(functional_call(network, masked, ((others + shift).clamp(0, 1),)), labels)
    plain = functional.cross_entropy(functional_call(network, masked, (others,)), labels)
    size = sum(mask.sum() for mask in masks.values())
    gradients = torch.autograd.grad(0.3 * plain + 0.7 * moved + 1e-5 * size, list(masks.values()))
    for mine, gradient in zip(found.masks, gradients, strict=True):
        sure = gradient.abs() > 1e-6  # below, rounding decides the sign
        expected = torch.where(gradient > 0, torch.tensor(0.9), torch.tensor(1.0))
        torch.testing.assert_close(mine.detach()[sure], expected[sure], rtol=0, atol=2e-3)
        assert sure.float().mean() > 0.5


def test_the_repaired_model_computes_what_the_masked_network_computes(bright: Any) -> None:
    before = {name: value.clone() for name, value in bright.model.network.state_dict().items()}
    found = last(bright.model, bright.data, SETTINGS)
    images = bright.data.images[:16]
    repaired = found.model()
    torch.testing.assert_close(repaired.module(images), found(images))
    assert all(torch.equal(value, before[name]) for name, value in bright.model.network.state_dict().items())
    changed = {name for name, value in repaired.network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight", "3.weight"} and found.share < 1
    values = torch.cat([mask.detach().flatten() for mask in found.masks])
    assert values.min() >= 0 and values.max() <= 1


def test_the_same_seed_gives_the_same_masks(bright: Any) -> None:
    one, two, other = (last(bright.model, bright.data, SETTINGS, seed) for seed in (1, 1, 2))
    assert all(torch.equal(mine, same) for mine, same in zip(one.masks, two.masks, strict=True))
    assert not all(torch.equal(mine, same) for mine, same in zip(one.masks, other.masks, strict=True))


def test_fewer_images_than_a_batch_still_move_the_masks(bright: Any) -> None:
    """The published code takes no step then."""
    few = bright.data.subset(torch.arange(5))
    one, many = (last(bright.model, few, replace(SETTINGS, batch_size=128, copies=copies)) for copies in (1, 10))
    assert one.share < 1 and many.share < 1 and one.share != many.share


def test_a_part_of_the_strength_is_a_part_of_the_change(bright: Any) -> None:
    found = last(bright.model, bright.data, SETTINGS)
    none, half, whole = (found.model(strength).network.get_parameter("3.weight") for strength in (0.0, 0.5, 1.0))
    assert torch.equal(none, bright.model.network.get_parameter("3.weight"))
    torch.testing.assert_close(half, (none + whole) / 2)


def test_a_loss_that_is_not_finite_is_an_error(bright: Any) -> None:
    with pytest.raises(TrainingError, match="in epoch 1"):
        last(broken(bright.model), bright.data, SETTINGS)


def test_a_network_without_convs_is_an_error(bright: Any) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()
    with pytest.raises(ArchitectureError, match="no conv whose weights"):
        SoftMasks(Model(network, "linear", 3, (3, 8, 8)))


@pytest.mark.parametrize("name", ["epochs", "passes", "batch_size", "copies"])
def test_settings_without_a_step_are_an_error(name: str) -> None:
    with pytest.raises(OptionError, match="of SoftMaskSettings"):
        SoftMaskSettings(**{name: 0})


@pytest.mark.parametrize("setting", [{"lr": 0.0}, {"alpha": -1.0}, {"radius": float("inf")}])
def test_settings_out_of_range_are_errors(setting: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(setting))):
        SoftMaskSettings(**setting)  # type: ignore[arg-type]
