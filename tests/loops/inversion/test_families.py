"""The families of triggers: what they do to images, and their sizes."""

from __future__ import annotations

import pytest
import torch

from bdprune.loops.inversion.families import FAMILIES, Family
from bdprune.record import TriggerKind

IMAGES = torch.rand(4, 3, 8, 12, generator=torch.Generator().manual_seed(0))
SHAPE = (3, 8, 12)


def started(family: Family, count: int = 2) -> list[torch.Tensor]:
    return family.start(count, SHAPE, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", FAMILIES)
def test_gradients_reach_every_variable(kind: TriggerKind) -> None:
    family = FAMILIES[kind]
    variables = [one.requires_grad_() for one in started(family)]
    masks, patterns = family.tensors(variables, SHAPE)
    stamped = family.apply(IMAGES, masks, patterns, torch.tensor([[0, 1, 2], [3, 3, 0]]))
    assert stamped.shape == (2, 3, 3, 8, 12)
    (stamped.square().sum() + family.sizes(masks, patterns).sum()).backward()
    assert all(one.grad is not None and one.grad.isfinite().all() and one.grad.any() for one in variables)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_trigger_is_stamped_on_the_images_that_are_picked(kind: TriggerKind) -> None:
    family = FAMILIES[kind]
    masks, patterns = family.tensors(started(family), SHAPE)
    everywhere = family.apply(IMAGES, masks, patterns)
    picked = family.apply(IMAGES, masks, patterns, torch.tensor([[2, 0], [1, 1]]))
    assert torch.equal(picked[0], everywhere[0, [2, 0]]) and torch.equal(picked[1], everywhere[1, [1, 1]])


def test_a_still_warp_changes_nothing() -> None:
    warp = FAMILIES["warp"]
    still = torch.zeros(1, 2, 8, 12)
    assert torch.allclose(warp.apply(IMAGES, None, still)[0], IMAGES, atol=1e-5)
    assert float(warp.sizes(None, still)) < 1e-3


def test_a_warp_takes_colours_from_where_it_points() -> None:
    warp, flow = FAMILIES["warp"], torch.zeros(1, 2, 8, 12)
    flow[:, 0], flow[:, 1] = 2.0, 1.0  # two to the right, one down
    moved = warp.apply(IMAGES, None, flow)[0]
    assert torch.allclose(moved[:, :, :-1, :-2], IMAGES[:, :, 1:, 2:], atol=1e-5)
    assert float(warp.sizes(None, flow)) == pytest.approx(8 * 12 * 5**0.5)


def test_the_first_warps_are_small() -> None:
    warp = FAMILIES["warp"]
    _, flows = warp.tensors(started(warp, 20), SHAPE)
    assert flows.shape == (20, 2, 8, 12) and flows.abs().max() < 0.2
