"""A recovered trigger: how it is stamped, its size and its place."""

from __future__ import annotations

import torch

from bdprune.loops import Trigger
from bdprune.record import Box


def patch() -> Trigger:
    mask, pattern = torch.zeros(1, 8, 8), torch.zeros(3, 8, 8)
    mask[:, 5:8, 4:6], pattern[0] = 0.75, 1.0
    return Trigger(mask, pattern, target=2, flip_rate=0.5, images=4)


def test_a_patch_covers_its_pixels_only() -> None:
    images = torch.rand(2, 3, 8, 8)
    stamped = patch().apply(images)
    assert torch.equal(stamped[:, :, :5], images[:, :, :5])
    assert torch.allclose(stamped[:, 0, 5:, 4:6], 0.25 * images[:, 0, 5:, 4:6] + 0.75)
    assert torch.allclose(stamped[:, 1:, 5:, 4:6], 0.25 * images[:, 1:, 5:, 4:6])


def test_the_record_of_a_patch() -> None:
    info = patch().info
    assert (info.kind, info.target_label, info.size) == ("patch", 2, 4.5)
    assert info.box == Box(x=4, y=5, width=2, height=3)


def test_an_additive_trigger_is_clipped_and_has_no_place() -> None:
    trigger = Trigger(None, torch.full((3, 4, 4), -0.25), target=None, kind="additive")
    images = torch.zeros(1, 3, 4, 4)
    assert trigger.kind == "additive" and trigger.size == 4.0 and trigger.box is None
    assert torch.equal(trigger.apply(images), images)
    assert torch.equal(trigger.apply(images + 1), images + 0.75)


def test_an_empty_trigger_has_no_place() -> None:
    assert Trigger(torch.zeros(1, 4, 4), torch.zeros(3, 4, 4), target=0).box is None
