"""Masks under adversarial noise, compared with the formula on plain layers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from bdprune.errors import OptionError, TrainingError
from bdprune.loops.adversarial_mask import AdversarialMaskSettings, NoisyMasks, _ascend, learn_masks
from bdprune.model.edit.mask import MaskedNetwork
from bdprune.model.handle import Model
from bdprune.runtime.batches import crop_and_flip
from bdprune.runtime.precision import Plan

from ..helpers import broken

SETTINGS = AdversarialMaskSettings(iterations=4, batch_size=30, padding=0, small_data=1000)


def logits(network: Any, images: torch.Tensor, masks: list[Any], noise: list[Any], shifts: list[Any]) -> torch.Tensor:
    """The network of the fixture as written in the paper: scale (m + d) gamma and shift (1 + x) beta."""
    x = images
    for conv, norm, mask, delta, xi in zip((0, 3), (1, 4), masks, noise, shifts, strict=True):
        bn = network[norm]
        scale, shift = (mask + delta) * bn.weight.detach(), (1 + xi) * bn.bias.detach()
        x = functional.batch_norm(network[conv](x), bn.running_mean, bn.running_var, scale, shift, False, eps=bn.eps)
        x = x.relu()
    return network[8](x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_an_update_is_that_of_the_paper(bright: Any, steps: int, project: bool) -> None:
    settings = replace(SETTINGS, iterations=1, attack_steps=steps, project=project, lr=0.01)
    found = learn_masks(bright.model, bright.data, settings, seed=3, precision="float32")
    network, generator = bright.model.network, torch.Generator().manual_seed(3)
    index = torch.randint(len(bright.data), (30,), generator=generator)
    images, labels = crop_and_flip(bright.data.images[index], generator, 0), bright.data.labels[index]
    xi_a, xi_b, delta_a, delta_b = ((2 * torch.rand(12, generator=generator) - 1) * 0.4 for _ in range(4))
    masks, noise = [torch.ones(12, requires_grad=True) for _ in range(2)], [delta_a, delta_b, xi_a, xi_b]
    for _ in range(steps):
        noise = [one.detach().requires_grad_() for one in noise]
        loss = functional.cross_entropy(logits(network, images, masks, noise[:2], noise[2:]), labels)
        moved = [one + 0.4 / steps * by.sign() for one, by in zip(noise, torch.autograd.grad(loss, noise), strict=True)]
        noise = [one.detach().clamp(-0.4, 0.4) if project else one.detach() for one in moved]
    zero = [torch.zeros(12)] * 2
    loss = 0.2 * functional.cross_entropy(logits(network, images, masks, zero, zero), labels)
    loss = loss + 0.8 * functional.cross_entropy(logits(network, images, masks, noise[:2], noise[2:]), labels)
    gradients = torch.autograd.grad(loss, masks)
    assert found.losses == (pytest.approx(loss.item(), rel=1e-4),)
    for mask, by, name in zip(masks, gradients, ("0", "3"), strict=True):
        expected = (mask - 0.01 * by).clamp(0, 1).detach()
        torch.testing.assert_close(found.masks[name], expected, rtol=1e-4, atol=1e-5)
        assert (expected < 1).any()


def test_masks_stay_in_the_unit_interval_and_the_model_stays_as_it_is(bright: Any) -> None:
    before = {name: value.clone() for name, value in bright.model.network.state_dict().items()}
    found = learn_masks(bright.model, bright.data, replace(SETTINGS, small_data=0))
    values = torch.cat(list(found.masks.values()))
    assert values.shape == (24,) and values.min() >= 0 and values.max() <= 1 and (values < 1).any()
    assert len(found.losses) == 4
    assert all(torch.equal(value, before[name]) for name, value in bright.model.network.state_dict().items())


def test_the_same_seed_gives_the_same_masks(bright: Any) -> None:
    one, two, other = (learn_masks(bright.model, bright.data, SETTINGS, seed=seed) for seed in (1, 1, 2))
    assert one.losses == two.losses != other.losses
    assert all(torch.equal(one.masks[name], two.masks[name]) for name in one.masks)


def test_fewer_images_than_a_batch_still_give_every_update(bright: Any) -> None:
    few = bright.data.subset(torch.arange(5))
    assert len(learn_masks(bright.model, few, replace(SETTINGS, batch_size=128)).losses) == 4


def test_noise_leaves_the_branch_without_noise_alone(bright: Any) -> None:
    noisy, plain = NoisyMasks(bright.model).eval(), MaskedNetwork(bright.model).eval()
    images = bright.data.images[:8]
    noisy.start(0.4, torch.Generator().manual_seed(0))
    assert torch.equal(noisy.masked(images), plain(images))
    assert not torch.allclose(noisy(images), plain(images))


@pytest.mark.parametrize(("project", "reach"), [(True, 0.4), (False, 0.8)])
def test_only_projected_noise_keeps_its_size(bright: Any, project: bool, reach: float) -> None:
    noisy = NoisyMasks(bright.model)
    noisy.start(0.4, torch.Generator().manual_seed(0))
    _ascend(noisy, Plan(), bright.data.images[:30], bright.data.labels[:30], replace(SETTINGS, project=project))
    largest = max(float(value.abs().max()) for value in noisy.noise.values())
    assert largest <= reach + 1e-6 and (project or largest > 0.4)


def test_without_a_norm_the_noise_is_on_the_output_and_the_bias_of_the_conv() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    noisy = NoisyMasks(Model(network.eval(), "plain", 2, (1, 8, 8)))
    noisy.start(0.4, torch.Generator().manual_seed(0))
    xi, delta = noisy.noise["network.network.0.bias"], noisy.noise["mask_list.0"]
    images = torch.rand(3, 1, 8, 8)
    changed = copy.deepcopy(network)
    with torch.no_grad():
        changed[0].bias.mul_(1 + xi)
        changed[0].weight.mul_((1 + delta).view(-1, 1, 1, 1))
        changed[0].bias.mul_(1 + delta)
        torch.testing.assert_close(noisy(images), changed(images))


def test_a_loss_that_is_not_finite_is_an_error(bright: Any) -> None:
    with pytest.raises(TrainingError, match="step 1"):
        learn_masks(broken(bright.model), bright.data, SETTINGS)


def test_settings_without_an_update_are_an_error() -> None:
    with pytest.raises(OptionError, match="iterations of AdversarialMaskSettings"):
        AdversarialMaskSettings(iterations=0)


@pytest.mark.parametrize("setting", [{"lr": -1.0}, {"alpha": 3.0}, {"eps": float("nan")}, {"averaged": 2.0}])
def test_settings_out_of_range_are_errors(setting: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(setting))):
        AdversarialMaskSettings(**setting)  # type: ignore[arg-type]


def test_masks_can_be_averaged_over_the_last_updates(bright: Any) -> None:
    def masks(iterations: int, averaged: float = 0.0) -> torch.Tensor:
        settings = replace(SETTINGS, iterations=iterations, averaged=averaged)
        return torch.cat(list(learn_masks(bright.model, bright.data, settings).masks.values()))

    torch.testing.assert_close(masks(4, averaged=0.5), (masks(3) + masks(4)) / 2)
