"""A bilinear warp of a linear ramp gives the ramp's value at the warped position, so ramps show the field exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bdprune.attacks.wanet import WaNet

from .helpers import setting


def ramps(height: int, width: int) -> Tensor:
    """``[2, 1, H, W]``: a ramp from 0 to 1 to the right, and one downwards."""
    right = torch.linspace(0, 1, width).expand(height, width)
    down = torch.linspace(0, 1, height)[:, None].expand(height, width)
    return torch.stack([right, down])[:, None]


def displacement(trigger: nn.Module, height: int, width: int) -> Tensor:
    """How far pixels are moved, in coordinates from -1 to 1: ``[2 (x, y), H, W]``."""
    images = ramps(height, width)
    return 2 * (trigger(images) - images)[:, 0]


def unit_field(seed: int, cells: int = 4) -> Tensor:
    field = torch.rand(1, 2, cells, cells, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (field / field.abs().mean())[0]


def test_the_field_passes_through_its_seeded_points() -> None:
    # Every fifth of 16 pixels is a point of a 4x4 field; the warp is clipped at the border, so look inside.
    moved = displacement(WaNet(target=0, strength=0.5, field_seed=3).new_trigger((1, 16, 16)), 16, 16)
    assert torch.allclose(moved[:, 5:11:5, 5:11:5], 0.5 * unit_field(3)[:, 1:3, 1:3] / 16, atol=1e-5)


def test_displacement_is_measured_in_parts_of_each_side() -> None:
    moved = displacement(WaNet(target=0, strength=0.5, field_seed=3).new_trigger((1, 16, 31)), 16, 31)
    expected = 0.5 * unit_field(3)[:, 1:3, 1:3] / torch.tensor([31.0, 16.0]).view(2, 1, 1)
    assert torch.allclose(moved[:, 5:11:5, 10:21:10], expected, atol=1e-5)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_the_warp_is_small_and_fixed(size: int) -> None:
    trigger = WaNet(target=0).new_trigger((3, size, size))
    pixels = displacement(trigger, size, size) * (size - 1) / 2
    assert 0.1 < pixels.abs().mean() < 0.5  # about strength / 2
    image = torch.rand(1, 3, size, size)
    twins = trigger(torch.cat([image, torch.rand(1, 3, size, size), image]))
    assert torch.equal(twins[0], twins[2])


def test_zero_strength_gives_no_warp() -> None:
    image = torch.rand(1, 3, 32, 32)
    assert torch.allclose(WaNet(target=0, strength=0).new_trigger((3, 32, 32))(image), image, atol=1e-5)


def test_the_field_depends_only_on_its_seed() -> None:
    image = torch.rand(1, 3, 16, 16)
    one, same = WaNet(target=0).new_trigger((3, 16, 16))(image), WaNet(target=4, rate=0.3).new_trigger((3, 16, 16))
    assert torch.equal(one, same(image))
    assert not torch.equal(one, WaNet(target=0, field_seed=1).new_trigger((3, 16, 16))(image))


def test_each_cover_is_warped_with_its_own_jitter_and_keeps_its_label() -> None:
    bytes_ = (ramps(16, 16)[:1] * 255).round().to(torch.uint8)  # 17 levels a pixel
    given = replace(setting(count=40, channels=1), images=bytes_.expand(40, 1, 16, 16))
    attack = WaNet(target=4, rate=0.25)
    trigger = attack.new_trigger((1, 16, 16))
    done = attack.poison(given, trigger, torch.Generator().manual_seed(0))
    assert len(done.triggered) == 10 and len(done.covers) == 20
    assert not set(done.triggered.tolist()) & set(done.covers.tolist())
    assert torch.equal(done.labels[done.covers], given.labels[done.covers])
    plain = 255 * trigger(bytes_.float() / 255)
    away = done.images[done.covers].float() - plain
    # One part in 16 of coordinates from -1 to 1 is 1/32 of the ramp, 8 levels; rounding adds one in all.
    assert away.abs().max() <= 255 / 32 + 1
    inner = away[..., 2:-2]  # the border is clipped
    assert inner.std() == pytest.approx(255 / 32 / 3**0.5, rel=0.1)  # uniform
    assert inner.mean().abs() < 0.5
    assert (away[0] - away[1]).abs().mean() > 1
    assert (done.images[done.triggered].float() - plain).abs().max() <= 0.5 + 1e-3


def test_cover_ratio_is_a_setting() -> None:
    attack = WaNet(target=4, rate=0.25, cover_ratio=0)
    done = attack.poison(setting(), attack.new_trigger((3, 16, 16)), torch.Generator().manual_seed(0))
    assert len(done.covers) == 0
