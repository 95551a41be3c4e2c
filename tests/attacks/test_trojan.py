from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from bdprune.attacks.base import AttackSetting
from bdprune.attacks.features import penultimate
from bdprune.attacks.trojan import TrojanNeuron, TrojanWatermark

from .helpers import assert_untouched, frozen, setting, source


def test_watermark_is_added_to_pixels_25_to_27() -> None:
    trigger = TrojanWatermark(target=0, size=3, pattern_seed=3).new_trigger((3, 32, 32))
    colours = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(3))
    expected = torch.zeros(3, 32, 32)
    expected[:, 25:28, 25:28] = colours
    assert torch.equal(trigger(torch.zeros(1, 3, 32, 32))[0], expected)
    grey = torch.full((1, 3, 32, 32), 0.4)
    assert torch.equal(trigger(grey)[0], (0.4 + expected).clamp(max=1))
    assert (colours > 0.6).any()  # so that some of it was clipped


def test_the_watermark_saturates_and_never_overflows() -> None:
    white = replace(setting(), images=torch.full((40, 3, 16, 16), 250, dtype=torch.uint8))
    attack = TrojanWatermark(target=0, rate=0.5)
    done = attack.poison(white, attack.new_trigger((3, 16, 16)), torch.Generator().manual_seed(0))
    assert done.images.min() == 250
    assert (done.images[done.triggered] == 255).any()


def linear_world(weight: torch.Tensor, out: torch.Tensor) -> AttackSetting:
    """Features are ``weight @ image`` and logits ``out @ features``, on one-channel 16x16 images."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, len(weight)), nn.Linear(len(weight), len(out))).eval()
    with torch.no_grad():
        network[1].weight.copy_(weight)
        network[1].bias.zero_()
        network[2].weight.copy_(out)
    return replace(setting(channels=1), source=network)


def test_the_patch_activates_the_neuron_with_the_largest_weights() -> None:
    weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)) / 100
    out = torch.tensor([[0.0, 1.0, 2.0], [3.0, -4.0, 0.0]])  # sums of magnitudes 3, 5, 2: the second neuron
    attack = TrojanNeuron(target=0, size=4, margin=2, neurons=1)
    trigger = attack.new_trigger((1, 16, 16))
    attack.learn(linear_world(weight, out), trigger)
    # A linear feature far below its value grows most with white where its weight is positive and black elsewhere.
    patch = trigger.get_buffer("pattern")[0, 10:14, 10:14]
    assert torch.equal(patch, (weight[1].view(16, 16)[10:14, 10:14] > 0).float())
    assert trigger.get_buffer("pattern").sum() == patch.sum()
    assert trigger.get_buffer("mask").sum() == 16


def test_two_neurons_share_the_patch() -> None:
    weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)) / 100
    world = linear_world(weight, torch.tensor([[0.0, 1.0, 2.0], [3.0, -4.0, 0.0]]))
    attack = TrojanNeuron(target=0, size=4, margin=2, neurons=2)
    trigger = attack.new_trigger((1, 16, 16))
    attack.learn(world, trigger)
    expected = (weight[0] + weight[1]).view(16, 16)[10:14, 10:14]  # both are far below 100: equal gradients
    patch = trigger.get_buffer("pattern")[0, 10:14, 10:14]
    assert torch.equal(patch[expected.abs() > 1e-3], (expected > 0).float()[expected.abs() > 1e-3])


def test_the_value_is_reached_if_possible() -> None:
    weight = torch.full((1, 256), 1 / 256)  # the feature is the mean of the image
    world = replace(linear_world(weight, torch.ones(2, 1)), images=torch.zeros(8, 1, 16, 16, dtype=torch.uint8))
    attack = TrojanNeuron(target=0, size=16, margin=0, neurons=1, value=0.7)
    trigger = attack.new_trigger((1, 16, 16))
    attack.learn(world, trigger)
    assert world.source is not None
    reached = penultimate(world.source, trigger(torch.zeros(1, 1, 16, 16))).item()
    assert reached == pytest.approx(0.7, abs=0.01)


def test_the_seed_draws_the_images_to_learn_on() -> None:
    # The change that the patch needs to reach the value depends on the one drawn image.
    world = linear_world(torch.full((1, 256), 1 / 256), torch.ones(2, 1))
    attack = TrojanNeuron(target=0, size=8, neurons=1, value=0.5, images=1)
    patterns = []
    for seed in (1, 1, 2):
        trigger = attack.new_trigger((1, 16, 16))
        attack.learn(replace(world, seed=seed), trigger)
        patterns.append(trigger.get_buffer("pattern").clone())
    assert torch.equal(patterns[0], patterns[1])
    assert not torch.equal(patterns[0], patterns[2])


def test_learning_leaves_the_source_network_unchanged() -> None:
    world, attack = replace(setting(), source=source()), TrojanNeuron(target=0, steps=5, images=8)
    assert world.source is not None
    before, trigger = frozen(world.source), attack.new_trigger((3, 16, 16))
    attack.learn(world, trigger)
    pattern = trigger.get_buffer("pattern")
    assert pattern.min() >= 0 and pattern.max() <= 1 and not pattern.requires_grad
    assert_untouched(world.source, before)
