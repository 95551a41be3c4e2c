from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bdprune.loops.margin import margins
from bdprune.loops.perturbation import ChangeSettings, PerturbSettings, smallest_triggers, universal_change
from bdprune.runtime import FrozenNetworks

SETTINGS = PerturbSettings(rounds=2, steps=30, lr=0.1, const=20.0, most_const=40.0, margin=0.5)


def test_the_margin_is_against_the_largest_other_logit() -> None:
    logits = torch.tensor([[[1.0, 4.0, 2.0], [3.0, 0.0, 5.0]]])
    assert margins(logits, torch.tensor([[1, 0]])).tolist() == [[2.0, -2.0]]


def to(target: int) -> Any:
    def loss(logits: Tensor) -> Tensor:
        return -margins(logits, torch.full(logits.shape[:2], target))

    return loss


def test_triggers_succeed_and_a_larger_penalty_makes_them_smaller(bright: Any) -> None:
    networks = FrozenNetworks([bright.model], bright.data.images)
    picks = torch.tensor([[0, 3, 6, 1], [0, 1, 3, 4]])  # the labels of the images are 0, 1, 2, 0, ...
    lenient, strict = (
        next(smallest_triggers(networks, bright.data.images, picks, to(2), replace(SETTINGS, const=const), seeded()))
        for const in (20.0, 2.0)
    )
    assert bool((lenient.successes == 1).all())
    assert bool((strict.sizes < lenient.sizes).all())
    assert lenient.masks.shape == (2, 1, 8, 8) and lenient.logits.shape == (2, 4, 3)
    for values in (lenient.masks, lenient.patterns):
        assert bool(((values >= 0) & (values <= 1)).all())
    assert torch.equal(lenient.successes, (lenient.logits.argmax(2) == 2).float().mean(1))


def test_a_success_gets_a_larger_penalty(bright: Any) -> None:
    networks = FrozenNetworks([bright.model], bright.data.images)

    def always(logits: Tensor) -> Tensor:
        return 0 * logits[..., 0] - 1

    settings = PerturbSettings(rounds=2, steps=1, lr=0.1, const=2.0, least_const=1.0)
    rounds = smallest_triggers(networks, bright.data.images, torch.tensor([[0, 3]]), always, settings, seeded())
    sizes = [float(one.sizes) for one in rounds]
    assert sizes == pytest.approx([64 * 0.45, 64 * (0.45 - 0.1 / 1.5)], rel=1e-4)


def test_an_impossible_attack_gets_a_smaller_penalty(bright: Any) -> None:
    networks = FrozenNetworks([bright.model], bright.data.images)
    picks = torch.tensor([[0, 3]])

    def never(logits: Tensor) -> Tensor:
        return 0 * logits[..., 0] + 1

    settings = PerturbSettings(rounds=3, steps=1, lr=0.1, const=1.0, most_const=6.0)
    rounds = list(smallest_triggers(networks, bright.data.images, picks, never, settings, torch.Generator()))
    assert [float(one.successes) for one in rounds] == [0, 0, 0]
    sizes = [float(one.sizes) for one in rounds]
    # A mask of 64 pixels at 0.5 falls by 0.1 / const in each round; const is 1, then 3.5 and 4.75.
    assert sizes == pytest.approx([64 * 0.4, 64 * (0.4 - 0.1 / 3.5), 64 * (0.4 - 0.1 / 3.5 - 0.1 / 4.75)], rel=1e-4)


def test_one_hypothesis_does_not_change_another(bright: Any) -> None:
    networks = FrozenNetworks([bright.model], bright.data.images)
    picks = torch.tensor([[0, 3], [1, 4]])
    settings = PerturbSettings(rounds=1, steps=5)
    both = next(smallest_triggers(networks, bright.data.images, picks, to(2), settings, seeded()))
    one = next(smallest_triggers(networks, bright.data.images, picks[:1], to(2), settings, seeded()))
    torch.testing.assert_close(both.masks[:1], one.masks, rtol=1e-4, atol=1e-4)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_one_small_change_leads_images_to_labels_or_away_from_them(bright: Any) -> None:
    images, labels, settings = bright.data.images, bright.data.labels, ChangeSettings(bound=0.3, steps=30)
    goal = torch.full_like(labels, 2)
    change = universal_change(bright.model.module, images, goal, settings)
    assert change.shape == (1, 3, 8, 8) and change.abs().max() <= 0.3 + 1e-6 and not change.requires_grad
    assert torch.equal(change, universal_change(bright.model.module, images, goal, settings))
    led = bright.model.module((images + change).clamp(0, 1)).argmax(1)
    assert (led == 2).float().mean() > (bright.model.module(images).argmax(1) == 2).float().mean()
    away = universal_change(bright.model.module, images, labels, settings, away=True)
    wrong = bright.model.module((images + away).clamp(0, 1)).argmax(1) != labels
    assert wrong.float().mean() > 0.3
    assert not any(one.grad is not None for one in bright.model.module.parameters())
