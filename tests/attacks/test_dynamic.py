import dataclasses

import pytest
import torch
from torch import Tensor

from bdprune.attacks.dynamic import Dynamic, InputAware, spread
from bdprune.errors import OptionError

from .toy import CLASSES, SCHEDULE, attacked, measured, network, task, weights


class Plain(InputAware):
    """The pattern of an image is its mean everywhere, its mask is one."""

    def patterns(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3), keepdim=True).expand_as(images)

    def masks(self, images: Tensor) -> Tensor:
        return torch.ones_like(images[:, :1])


def test_every_image_carries_its_own_pattern_through_its_own_mask() -> None:
    images, trigger = torch.rand(3, 3, 16, 20), Dynamic(target=0, width=4).new_trigger((3, 16, 20))
    pattern, mask = trigger.patterns(images), trigger.masks(images)
    assert mask.shape == (3, 1, 16, 20)
    for made in (pattern, mask, trigger(images)):
        assert 0 <= made.min() < made.max() <= 1
    assert torch.allclose(trigger(images), (1 - mask) * images + mask * pattern, atol=1e-6)
    assert (pattern[0] - pattern[1]).abs().max() > 1e-3


def test_the_mask_is_pushed_towards_0_and_1() -> None:
    trigger = Dynamic(target=0, width=4).new_trigger((3, 16, 16))
    for value, expected in ((-0.5, 0.0), (0.0, 0.5), (0.5, 1.0)):
        torch.nn.init.zeros_(trigger.mask.last.weight)
        torch.nn.init.constant_(trigger.mask.last.bias, value)
        assert trigger.masks(torch.rand(1, 3, 16, 16)).mean().item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("target", [1, None])
def test_batch_has_exact_shares_and_crossed_images_keep_their_label(target: int | None) -> None:
    attack = Dynamic(target=target, rate=0.1, cross_rate=0.2, width=4)
    objective = attack.objective(task(8), Plain(3, 4))
    labels = torch.tensor([1, 0, 2, 3, 1, 0, 2, 3, 0, 2] * 2)
    images = torch.rand(20, 3, 16, 16)
    batch, wanted, _ = objective.attacked(images, labels)
    order = torch.tensor([index for index in range(20) if labels[index] != 1] + [0, 4, 10, 14])
    images, labels = (images, labels) if target is None else (images[order], labels[order])
    means = images.mean((1, 2, 3))
    assert torch.allclose(batch[:2], means[:2].view(-1, 1, 1, 1).expand(2, 3, 16, 16))  # their own patterns
    assert torch.allclose(
        batch[2:6], means[6:10].view(-1, 1, 1, 1).expand(4, 3, 16, 16)
    )  # the patterns of other images
    assert torch.equal(batch[6:], images[6:])
    assert torch.equal(wanted[:2], torch.ones(2, dtype=torch.int64) if target else (labels[:2] + 1) % CLASSES)
    assert torch.equal(wanted[2:], labels[2:])


def test_diversity_is_the_ratio_of_root_mean_squares() -> None:
    one, two = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    one[0], one[1] = 0.6, 0.2
    made, other = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    made[0], made[1] = 0.3, 0.4
    assert spread(one, two, made, other).item() == pytest.approx((0.6 / 0.3 + 0.2 / 0.4) / 2, rel=1e-5)


def test_diversity_of_equal_patterns_has_a_finite_gradient() -> None:
    made = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    spread(torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), made, torch.full((1, 3, 4, 4), 0.5)).backward()
    assert made.grad is not None
    assert made.grad.isfinite().all()


def test_the_mask_loss_is_its_weighted_excess_plus_diversity() -> None:
    trigger = Dynamic(target=0, width=4).new_trigger((3, 16, 16))
    objective = Dynamic(target=0, width=4, density=0.1, density_weight=7, diversity_weight=3).objective(
        task(8), trigger
    )
    images = torch.rand(4, 3, 16, 16)
    masks = trigger.masks(images)
    excess = (masks - 0.1).clamp(min=0).mean()
    diversity = spread(images, images[[3, 0, 1, 2]], masks, masks[[3, 0, 1, 2]])
    assert objective.mask_loss(images).item() == pytest.approx((7 * excess + 3 * diversity).item(), rel=1e-5)


def test_the_mask_is_trained_first_then_the_pattern_with_the_network() -> None:
    given, attack = task(32), Dynamic(target=1, width=4, mask_share=0.25)
    trigger, net = attack.new_trigger((3, 16, 16)), network().train()
    objective = attack.objective(given, trigger)
    images = given.images.float() / 255
    for done, moves in ((0.2, "mask"), (0.25, "pattern"), (0.9, "pattern")):
        before = {name: weights(getattr(trigger, name)) for name in ("mask", "pattern")}
        loss = objective.loss(net, images, given.labels, done)
        net.zero_grad()
        loss.backward()
        changed = {name for name, value in before.items() if not torch.equal(value, weights(getattr(trigger, name)))}
        assert changed == {moves}
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


def test_the_training_set_stays_clean() -> None:
    given, attack = task(16), Dynamic(target=1, width=4)
    poisoned = attack.poison(given, attack.new_trigger((3, 16, 16)), torch.Generator())
    assert torch.equal(poisoned.images, given.images)
    assert torch.equal(poisoned.labels, given.labels)


def test_patterns_of_other_images_succeed_less_often() -> None:
    attack = Dynamic(target=1, rate=0.25, cross_rate=0.25, mask_share=0.1, density=0.1, width=4)
    victim, trigger = attacked(attack, task(), dataclasses.replace(SCHEDULE, epochs=16), width=8)
    assert isinstance(trigger, InputAware)
    accuracy, success = measured(attack, victim, trigger)
    fresh = task(200, seed=9)
    images = fresh.images[fresh.labels != 1].float() / 255
    crossed = trigger.mix(images, trigger.patterns(images).roll(1, 0), trigger.masks(images).roll(1, 0))
    assert accuracy > 0.95
    assert success > 0.9
    assert (victim(crossed).argmax(1) == 1).float().mean() < success - 0.2
    assert trigger.masks(images).mean() < 0.2


@pytest.mark.parametrize("wrong", [{"cross_rate": 1.5}, {"mask_share": -1.0}, {"rate": 0.6, "cross_rate": 0.6}])
def test_impossible_shares_are_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        Dynamic(target=1, **wrong)
