from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from bdprune.attacks.label_consistent import LabelConsistent
from bdprune.attacks.patterns import checkerboard

from .helpers import assert_untouched, frozen, setting, source


def test_trigger_is_a_checkerboard_in_each_corner() -> None:
    images = 0.1 + 0.8 * torch.rand(2, 3, 16, 20)
    triggered = LabelConsistent(target=0, size=3, margin=1).new_trigger((3, 16, 20))(images)
    for rows in (slice(1, 4), slice(12, 15)):
        for columns in (slice(1, 4), slice(16, 19)):
            assert torch.equal(triggered[1, 2, rows, columns], checkerboard(3))
    assert ((triggered != images).any(1).sum(dim=(1, 2)) == 4 * 9).all()


def test_adversarial_images_move_the_full_radius_away_from_the_label() -> None:
    """Two classes and a linear network: the loss grows everywhere along the sign of the difference of its weights."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 2)).eval()
    given = replace(setting(count=20, channels=1, classes=2), source=network)
    attack = LabelConsistent(target=1, rate=0.3, epsilon=16 / 255, step=4 / 255, steps=10, size=2)
    trigger = attack.new_trigger((1, 16, 16))
    done = attack.poison(given, trigger, torch.Generator().manual_seed(0))
    away = (network[1].weight[0] - network[1].weight[1]).detach().sign().view(1, 1, 16, 16)
    inside = trigger.get_buffer("mask") == 0
    moved = done.images[done.triggered].float() - given.images[done.triggered].float()
    assert torch.equal(moved[:, inside], (16 * away).expand_as(moved)[:, inside])


def test_every_step_stays_in_the_ball_and_in_range() -> None:
    given = replace(setting(), images=torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8), source=source())
    attack = LabelConsistent(target=4, rate=0.1, epsilon=8 / 255, steps=6)
    trigger = attack.new_trigger((3, 16, 16))
    done = attack.poison(given, trigger, torch.Generator().manual_seed(0))
    moved = (done.images[done.triggered].float() - given.images[done.triggered].float()).abs()
    inside = trigger.get_buffer("mask")[0] == 0
    assert moved[..., inside].max() == 8
    corners = done.images[done.triggered][:, :, :3, :3]
    assert torch.equal(corners, (255 * checkerboard(3)).to(torch.uint8).expand(4, 3, 3, 3))


@pytest.mark.parametrize("count", [600, 40])  # three batches, and less than one
def test_images_get_harder_and_the_source_network_is_unchanged(count: int) -> None:
    network, images = source(), torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.full((count,), 4)
    before = frozen(network)
    loss = nn.CrossEntropyLoss(reduction="none")
    hard = LabelConsistent(target=4, steps=3)._hardened(network, images, 4, torch.Generator().manual_seed(0))
    assert_untouched(network, before)
    assert hard.shape == images.shape and not hard.requires_grad
    with torch.no_grad():
        assert (loss(network(hard), labels) > loss(network(images), labels)).float().mean() > 0.95


def test_zero_steps_give_the_random_start() -> None:
    given = replace(setting(), source=source())
    attack = LabelConsistent(target=4, rate=0.1, steps=0, epsilon=10 / 255)
    done = attack.poison(given, attack.new_trigger((3, 16, 16)), torch.Generator().manual_seed(0))
    moved = (done.images[done.triggered].float() - given.images[done.triggered].float())[:, :, 4:12, 4:12]
    assert moved.abs().max() == 10
    assert moved.std() == pytest.approx(10 / 3**0.5, rel=0.1)  # uniform
