from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bdprune.attacks.base import apply_trigger, saturate
from bdprune.attacks.blend import ABlend, Blend, pieces

from .helpers import setting


def cells(images: Tensor, grid: int = 4) -> Tensor:
    """Images ``[N, C, H, W]`` cut into cells: ``[N, grid * grid, values]``; H and W are multiples of ``grid``."""
    count, channels, height, width = images.shape
    cut = images.view(count, channels, grid, height // grid, grid, width // grid)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(count, grid * grid, -1)


def test_every_training_image_carries_eight_of_sixteen_pieces() -> None:
    given, attack = setting(), ABlend(target=4, rate=0.2, cover_rate=0.3)
    trigger = attack.new_trigger((3, 16, 16))
    done = attack.poison(given, trigger, torch.Generator().manual_seed(0))
    touched = torch.cat([done.triggered, done.covers])
    full = cells(saturate(apply_trigger(trigger, given.images[touched])))
    clean, made = cells(given.images[touched]), cells(done.images[touched])
    carried, left = (made == full).all(2), (made == clean).all(2)
    assert torch.equal(carried, ~left)
    assert (carried.sum(1) == 8).all()
    assert len(carried.unique(dim=0)) > 15  # each image has its own pieces
    assert carried.float().mean(0).min() > 0.2  # and every piece is drawn


def test_covers_keep_their_label_and_differ_from_poisoned_images() -> None:
    given, attack = setting(), ABlend(target=4, rate=0.2, cover_rate=0.3)
    done = attack.poison(given, attack.new_trigger((3, 16, 16)), torch.Generator().manual_seed(0))
    assert len(done.triggered) == 8 and len(done.covers) == 12
    assert not set(done.triggered.tolist()) & set(done.covers.tolist())
    assert torch.equal(done.labels[done.covers], given.labels[done.covers])
    assert (done.labels[done.triggered] == 4).all()


def test_the_trigger_at_test_time_is_the_whole_pattern() -> None:
    images = torch.rand(2, 3, 16, 16)
    whole = Blend(target=4).new_trigger((3, 16, 16))
    assert torch.equal(ABlend(target=4).new_trigger((3, 16, 16))(images), whole(images))


@pytest.mark.parametrize(
    ("size", "grid", "kept"), [((16, 16), 4, 8), ((18, 33), 4, 3), ((20, 20), 3, 9), ((7, 7), 3, 0)]
)
def test_pieces_tile_images_of_any_size(size: tuple[int, int], grid: int, kept: int) -> None:
    height, width = size
    drawn = pieces(500, torch.Size(size), grid, kept, torch.Generator().manual_seed(0))
    assert drawn.shape == (500, 1, height, width) and drawn.dtype == torch.bool
    # On average every pixel is covered equally often.
    assert (drawn.float().mean(0) - kept / grid**2).abs().max() < 0.1


def test_uneven_pieces_differ_by_at_most_one_pixel() -> None:
    drawn = pieces(200, torch.Size((18, 16)), 4, 1, torch.Generator().manual_seed(0))[:, 0]
    assert set(drawn.any(2).sum(1).tolist()) == {4, 5}
    assert set(drawn.any(1).sum(1).tolist()) == {4}


def test_all_pieces_at_once_equal_a_plain_blend() -> None:
    given = setting()
    plain, pieced = Blend(target=4, rate=0.2), ABlend(target=4, rate=0.2, kept=16, cover_rate=0)
    trigger = plain.new_trigger((3, 16, 16))
    one, two = (attack.poison(given, trigger, torch.Generator().manual_seed(0)) for attack in (plain, pieced))
    assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)
