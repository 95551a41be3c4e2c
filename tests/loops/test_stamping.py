"""Objectives that stamp recovered triggers on the images of a fine-tuning."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from bdprune.errors import OptionError
from bdprune.loops import Trigger
from bdprune.loops.stamping import StampedAndTaught, StampedLabels, Stamper, Stamping, TargetAscent, TargetComplement

PLAIN = Stamping(share=0.5, jitter=0.0, shift=0)
IMAGES, LABELS = torch.zeros(8, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def patch(target: int | None = 2) -> Trigger:
    """A white corner of one pixel."""
    mask = torch.zeros(1, 4, 4)
    mask[0, 0, 0] = 1
    return Trigger(mask, torch.ones(3, 4, 4), target)


def test_a_share_of_the_images_of_other_labels_carries_the_trigger() -> None:
    stamped, chosen, trigger = Stamper([patch()], PLAIN, 0).stamp(IMAGES, LABELS)
    assert chosen.tolist() == [0, 1, 3, 4] and trigger.target == 2
    assert stamped[chosen, :, 0, 0].eq(1).all() and stamped.sum() == 12
    assert not IMAGES.any()


def test_one_image_at_least_carries_it() -> None:
    _, chosen, _ = Stamper([patch()], Stamping(share=0.01), 0).stamp(IMAGES, LABELS)
    assert len(chosen) == 1


def test_images_of_the_target_alone_stay_as_they_are() -> None:
    stamped, chosen, _ = Stamper([patch()], PLAIN, 0).stamp(IMAGES, torch.full((8,), 2))
    assert not len(chosen) and torch.equal(stamped, IMAGES)


def test_strength_and_place_vary_within_their_ranges() -> None:
    stamper = Stamper([patch()], Stamping(share=1.0, jitter=0.3, shift=1), 0)
    drawn = [stamper.stamp(IMAGES, LABELS)[2] for _ in range(60)]
    assert all(one.mask is not None for one in drawn)
    strengths = [float(one.mask.max()) for one in drawn if one.mask is not None]
    places = {int(one.mask.argmax()) for one in drawn if one.mask is not None}
    assert 0.7 <= min(strengths) < 0.85 and max(strengths) == 1.0
    assert places == {row % 4 * 4 + column % 4 for row in (-1, 0, 1) for column in (-1, 0, 1)}


def test_pixels_of_a_grown_patch_are_left_out_up_to_a_share() -> None:
    found = Trigger(torch.full((1, 40, 40), 0.5), torch.ones(3, 40, 40), 2)
    images, settings = torch.zeros(2, 3, 40, 40), Stamping(share=1.0, jitter=0.0, shift=0, dropped=0.5)
    whole = Stamper([found], settings, 0).stamp(images, LABELS[:2])[2].mask
    assert whole is not None and found.mask is not None and torch.equal(whole, found.mask), "a found patch is small"
    stamper = Stamper([replace(found, grown=True)], settings, 0)
    masks = [stamper.stamp(images, LABELS[:2])[2].mask for _ in range(40)]
    shares = [float(one.eq(0).float().mean()) for one in masks if one is not None]
    assert len(shares) == 40 and min(shares) < 0.05 and 0.45 < max(shares) < 0.55
    assert all(set(one.unique().tolist()) <= {0.0, 0.5} for one in masks if one is not None)


def test_an_additive_trigger_changes_its_strength() -> None:
    change = Trigger(None, torch.full((3, 4, 4), 0.5), 2, kind="additive")
    stamper = Stamper([change], Stamping(share=1.0, jitter=0.5, shift=0), 0)
    strengths = {round(float(stamper.stamp(IMAGES, LABELS)[2].pattern.max()), 6) for _ in range(20)}
    assert len(strengths) == 20 and min(strengths) >= 0.25 and max(strengths) <= 0.75


def test_the_true_labels_are_learnt() -> None:
    weight = torch.zeros(3, 48, requires_grad=True)

    def run(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ weight.T

    loss = StampedLabels([patch()], PLAIN, 0).backward(run, IMAGES, LABELS)
    assert loss.item() == pytest.approx(math.log(3))
    # Only stamped images have a pixel; two of them have label 0 and two label 1.
    assert weight.grad is not None
    expected = torch.tensor([4 / 3 - 2, 4 / 3 - 2, 4 / 3]) / 8
    assert torch.allclose(weight.grad[:, 0], expected)


def test_images_without_a_trigger_keep_the_predictions_of_the_teacher() -> None:
    bias = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)

    def run(images: torch.Tensor) -> torch.Tensor:
        return bias.expand(len(images), 3)

    def seen(images: torch.Tensor) -> torch.Tensor:
        assert len(images) == 4 and not images.any(), "only images without the trigger"
        return torch.tensor([2.0, 0.0, 0.0]).expand(len(images), 3)

    plain = StampedLabels([patch()], PLAIN, 0).backward(run, IMAGES, LABELS)
    bias.grad = None
    loss = StampedAndTaught([patch()], PLAIN, 0, seen, weight=3.0).backward(run, IMAGES, LABELS)
    taught, learned = torch.tensor([1.0, 0.0, 0.0]).softmax(0), (bias.detach() / 2).softmax(0)
    gap = (taught * (taught / learned).log()).sum().item()
    assert loss.item() == pytest.approx(plain.item() + 3 * 4 * gap)
    assert bias.grad is not None


def test_the_target_is_unlearnt_up_to_the_limit() -> None:
    bias = torch.tensor([0.0, 0.0, 2.0], requires_grad=True)

    def run(images: torch.Tensor) -> torch.Tensor:
        return bias.expand(len(images), 3)

    TargetAscent([patch()], PLAIN, 0, limit=5.0).backward(run, IMAGES, LABELS)
    goal = torch.tensor([2, 2, 2, 2, 2, 2, 0, 1])
    sign = torch.tensor([-1, -1, 1, -1, -1, 1, 1, 1])
    other = torch.tensor([0.0, 0.0, 2.0], requires_grad=True)
    (sign * functional.cross_entropy(other.expand(8, 3), goal, reduction="none")).mean().backward()
    assert bias.grad is not None and other.grad is not None and torch.allclose(bias.grad, other.grad)
    bias.grad = None
    TargetAscent([patch()], PLAIN, 0, limit=0.01).backward(run, IMAGES, LABELS)
    assert bias.grad is not None and not torch.allclose(bias.grad, other.grad)


def test_the_target_becomes_unlikely_even_if_the_network_is_sure_of_it() -> None:
    bias = torch.tensor([0.0, 0.0, 12.0], requires_grad=True)

    def run(images: torch.Tensor) -> torch.Tensor:
        return bias.expand(len(images), 3)

    loss = TargetComplement([patch()], PLAIN, 0).backward(run, IMAGES, LABELS)
    assert bias.grad is not None
    # Four stamped images with -log(1 - p) of the target, and four others with their own labels 2, 2, 0 and 1.
    p = bias.detach().double().softmax(0)
    own = -p[[2, 2, 0, 1]].log()
    assert loss.item() == pytest.approx((4 * -math.log1p(-p[2].item()) + own.sum().item()) / 8, rel=1e-4)
    assert bias.grad[2].item() == pytest.approx((4 * p[2].item() + 4 * p[2].item() - 2) / 8, rel=1e-3)


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.5}, {"jitter": 1.0}, {"shift": -1}, {"dropped": 1.0}])
def test_numbers_outside_their_range_are_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="Triggers cannot be stamped"):
        Stamping(**wrong)
