"""The patch whose place, size, shape and colours are drawn."""

from __future__ import annotations

import pytest
import torch

from bdprune.attacks.drawn_patch import DrawnPatch
from bdprune.errors import OptionError


def changed(seed: int, **settings: int) -> torch.Tensor:
    """Which pixels the trigger changes, bool ``[32, 32]``."""
    trigger = DrawnPatch(target=0, pattern_seed=seed, **settings).new_trigger((3, 32, 32))
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return (trigger(images) != images).any(1)[0]


def test_the_seed_decides_the_patch() -> None:
    one, again, other = (DrawnPatch(target=0, pattern_seed=seed).new_trigger((3, 32, 32)) for seed in (4, 4, 5))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(one(images), again(images)) and not torch.equal(one(images), other(images))


@pytest.mark.parametrize("seed", range(40))
def test_every_patch_is_small_and_not_empty(seed: int) -> None:
    rows, columns = changed(seed).any(1).nonzero(), changed(seed).any(0).nonzero()
    assert 1 <= rows.max() - rows.min() + 1 <= 7 and 1 <= columns.max() - columns.min() + 1 <= 7


def test_places_and_numbers_of_pixels_vary() -> None:
    found = [changed(seed) for seed in range(40)]
    assert len({tuple(one.nonzero()[0].tolist()) for one in found}) > 30
    assert len({int(one.sum()) for one in found}) > 10


def test_a_patch_fits_into_a_small_image() -> None:
    trigger = DrawnPatch(target=0, smallest=5, largest=50).new_trigger((1, 6, 9))
    assert trigger(torch.zeros(1, 1, 6, 9)).shape == (1, 1, 6, 9)


def test_sizes_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(OptionError, match="smallest is 8, largest is 7"):
        DrawnPatch(target=0, smallest=8)
