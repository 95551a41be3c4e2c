"""A small patch grows to the strongest one at its place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bdprune.loops import GrowthSettings, Trigger, grow

IMAGES = torch.rand(12, 3, 20, 20, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3
SETTINGS = GrowthSettings(steps=40)


class Square(nn.Module):
    """The logit of label 2 is the sum of red less green in a square of 4 by 4 pixels; label 0 has a margin of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor) -> Tensor:
        square = images[:, :, 14:18, 14:18]
        raised = (square[:, 0] - square[:, 1]).sum((1, 2)) * self.scale
        return torch.stack([torch.full_like(raised, 4.0), torch.zeros_like(raised), raised], 1)


def patch(size: int = 2) -> Trigger:
    """A white patch inside the square."""
    mask = torch.zeros(1, 20, 20)
    mask[:, 15 : 15 + size, 15 : 15 + size] = 0.9
    return Trigger(mask, torch.ones(3, 20, 20), 2, flip_rate=0.5, images=7)


def test_a_part_of_the_square_grows_to_all_of_it_in_the_strongest_colours() -> None:
    grown = grow(Square(), patch(), IMAGES, LABELS, SETTINGS)
    assert grown is not None and grown.mask is not None
    expected = torch.zeros(1, 20, 20)
    expected[:, 14:18, 14:18] = 1
    assert torch.equal(grown.mask, expected)
    colours = grown.pattern[:, 14:18, 14:18]
    assert colours[0].min() > 0.9 and colours[1].max() < 0.1, "without the drops, a few pixels would have done"
    assert (grown.target, grown.flip_rate, grown.images, grown.grown) == (2, None, 0, True)


def test_a_patch_without_a_target_leads_away_from_the_true_label() -> None:
    grown = grow(Square(), replace(patch(), target=None), IMAGES, torch.zeros(12, dtype=torch.int64), SETTINGS)
    assert grown is not None
    predicted = Square()(grown.apply(IMAGES)).argmax(1)
    assert grown.flips(predicted, torch.zeros(12)).all()


def test_only_images_that_the_trigger_is_about_count() -> None:
    seen: list[Tensor] = []

    class Watched(Square):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.detach())
            return super().forward(images)

    grow(Watched(), replace(patch(), sources=(1,)), IMAGES, LABELS, SETTINGS)
    outside = torch.cat(seen)[:, 0, 0, 0]
    assert set(outside.tolist()) <= set(IMAGES[LABELS == 1][:, 0, 0, 0].tolist())


@pytest.mark.parametrize("away", [False, True])
def test_it_depends_on_the_seed_only_and_keeps_the_network(away: bool) -> None:
    network, trigger = Square(), replace(patch(), target=None if away else 2)
    one, two = (grow(network, trigger, IMAGES, LABELS, SETTINGS, seed=3) for _ in range(2))
    assert one is not None and two is not None and torch.equal(one.pattern, two.pattern)
    assert network.scale.grad is None


def test_what_is_no_small_patch_does_not_grow() -> None:
    additive = Trigger(None, torch.zeros(3, 20, 20), 2, kind="additive")
    assert grow(Square(), additive, IMAGES, LABELS, SETTINGS) is None
    assert grow(Square(), patch(size=4), IMAGES, LABELS, SETTINGS) is None, "it would cover 9 % of the image"
    assert grow(Square(), patch(), IMAGES, torch.full((12,), 2), SETTINGS) is None, "no image has another label"
