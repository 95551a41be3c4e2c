"""The attack of someone who knows the detectors, and its three penalties."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.analysis import channel_lipschitz
from bdprune.attacks.badnets import BadNets
from bdprune.attacks.base import AttackSetting
from bdprune.attacks.blend import Blend
from bdprune.attacks.evasion import (
    SmallTrigger,
    concentration,
    excess,
    likeness,
    strength,
    unlearned_concentration,
)
from bdprune.attacks.evasive import Evasive
from bdprune.errors import OptionError
from bdprune.loops.fitting import Schedule
from bdprune.model.handle import Model

from .toy import CLASSES, attacked, measured, network, task, weights

TARGET = 1
SCHEDULE = Schedule(epochs=6, batch_size=32, peak_lr=0.05, padding=0, flip=False, bf16=False)
NOTHING = {"unlearning": 0.0, "inversion": 0.0, "suspiciousness": 0.0}
ATTACK = Evasive(TARGET, 0.2, settings={"size": 5}, images=24, every=2, ascent_lr=0.1, ascent_steps=4)


def noisy(seed: int = 0, count: int = 256) -> AttackSetting:
    """The toy task, with other labels for a quarter of the images: a network that is never sure can unlearn."""
    clean = task(count, seed=seed)
    labels = torch.where(
        torch.arange(count) % 16 < 4, (clean.labels + 1 + torch.arange(count) // 16) % CLASSES, clean.labels
    )
    return dataclasses.replace(clean, labels=labels)


@pytest.fixture(scope="module")
def backdoored() -> nn.Module:
    return attacked(BadNets(TARGET, 0.2, size=5), noisy(), width=8)[0]


@pytest.fixture(scope="module")
def given(backdoored: nn.Module) -> AttackSetting:
    return dataclasses.replace(noisy(), source=backdoored)


def with_only(**weights: float) -> Evasive:
    return dataclasses.replace(ATTACK, **{**NOTHING, **weights})


@pytest.fixture(scope="module")
def control(given: AttackSetting) -> nn.Module:
    """The source, trained as far without any penalty."""
    return attacked(with_only(), given, SCHEDULE, width=8)[0]


def images_of(setting: AttackSetting) -> tuple[Tensor, Tensor]:
    return setting.images.float() / 255, setting.labels


def unlearned(net: nn.Module) -> float:
    """The mean concentration over several lengths of the ascent, on images that nothing was trained on."""
    images, labels = images_of(noisy(7))
    net = copy.deepcopy(net).train()
    found = [unlearned_concentration(net, images, labels, TARGET, steps, 0.05).item() for steps in (4, 6, 8)]
    return sum(found) / len(found)


def searched(net: nn.Module, steps: int = 60) -> float:
    """Cross-entropy with the target of images with a small trigger, after a search on ``net``."""
    images, labels = images_of(noisy(7))
    images = images[labels != TARGET]
    trigger, goal = SmallTrigger((3, 16, 16), 3), torch.full((len(images),), TARGET)
    adam = torch.optim.Adam(trigger.parameters(), 0.3)
    for _ in range(steps):
        loss = functional.cross_entropy(net(trigger(images)), goal)
        adam.zero_grad()
        (loss + 0.03 * trigger.size).backward()
        adam.step()
    return functional.cross_entropy(net(trigger(images)), goal).item() + 0.03 * trigger.size.item()


def largest_excess(net: nn.Module) -> float:
    return excess(net, Model(net, "toy", CLASSES, (3, 16, 16)).groups, ATTACK.mu).item()


def test_the_penalty_on_unlearning_lowers_the_concentration(
    backdoored: nn.Module, control: nn.Module, given: AttackSetting
) -> None:
    victim, _ = attacked(with_only(unlearning=2.0), given, SCHEDULE, width=8)
    assert unlearned(victim) < min(unlearned(backdoored), unlearned(control)) - 0.05


def test_the_penalty_on_inversion_makes_small_triggers_harder_to_find(
    backdoored: nn.Module, control: nn.Module, given: AttackSetting
) -> None:
    victim, _ = attacked(with_only(inversion=0.5), given, SCHEDULE, width=8)
    assert searched(victim) > 1.2 * max(searched(backdoored), searched(control))


def test_the_penalty_on_suspiciousness_flattens_the_layers(given: AttackSetting) -> None:
    source = copy.deepcopy(given.source)
    assert isinstance(source, nn.Sequential)
    with torch.no_grad():
        source[4].weight[3] *= 6
    given = dataclasses.replace(given, source=source)
    found = [
        largest_excess(attacked(with_only(suspiciousness=weight), given, SCHEDULE, width=8)[0]) for weight in (0.0, 5.0)
    ]
    assert found[0] > 0.3
    assert found[1] < found[0] / 2


def test_the_true_trigger_still_works(given: AttackSetting) -> None:
    before = weights(given.source) if given.source else None
    victim, trigger = attacked(ATTACK, given, SCHEDULE, width=8)
    accuracy, success = measured(ATTACK, victim, trigger)
    assert accuracy > 0.75
    assert success > 0.9
    assert before is not None and given.source is not None and torch.equal(weights(given.source), before)


def test_the_same_seed_gives_the_same_weights(given: AttackSetting) -> None:
    short = dataclasses.replace(SCHEDULE, epochs=1)
    one, two = (attacked(ATTACK, given, short, width=8)[0] for _ in range(2))
    assert torch.equal(weights(one), weights(two))


def test_without_penalties_it_trains_on_like_plain_cross_entropy(given: AttackSetting, control: nn.Module) -> None:
    class Plain(Evasive):
        objective = BadNets.objective  # type: ignore[assignment]

    plain, _ = attacked(Plain(TARGET, 0.2, settings={"size": 5}), given, SCHEDULE, width=8)
    assert torch.equal(weights(plain), weights(control))


def test_concentration_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.4, 0.4]]).log()
    assert concentration(logits, torch.tensor([0, 1, 2]), 1).item() == pytest.approx((0.25 + 0.4) / 2)
    assert concentration(logits, torch.tensor([1, 1, 1]), 1).item() == 0


def test_unlearning_leaves_the_network_alone_and_gives_it_the_gradient_of_its_copy() -> None:
    net, (images, labels) = network(4).train(), images_of(task(32))
    before = weights(net)
    value = unlearned_concentration(net, images, labels, TARGET, 3, 0.1)
    value.backward()
    assert torch.equal(weights(net), before)

    judge = copy.deepcopy(net)
    ascent = torch.optim.SGD(judge.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        ascent.zero_grad()
        (-functional.cross_entropy(judge(images), labels)).backward()
        ascent.step()
    ascent.zero_grad()
    wanted = concentration(judge(images), labels, TARGET)
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), abs=1e-6)
    for own, other in zip(net.parameters(), judge.parameters(), strict=True):
        assert own.grad is not None and other.grad is not None
        assert torch.allclose(own.grad, other.grad, atol=1e-6)


def test_strength_is_the_channel_lipschitz_score_with_a_gradient() -> None:
    net = network(4).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
        net[1].running_var.fill_(4.0)
    model = Model(net, "toy", CLASSES, (3, 16, 16))
    wanted = channel_lipschitz(model)
    for group in model.groups:
        assert torch.allclose(strength(net, group), wanted[group.name], rtol=1e-4)
    strength(net, model.groups[0]).max().backward()
    assert net[1].weight.grad is not None
    assert net[1].weight.grad.count_nonzero() == 1


def test_the_excess_of_one_layer_by_hand() -> None:
    net = network(4).eval()
    groups = Model(net, "toy", CLASSES, (3, 16, 16)).groups[:1]
    scores = strength(net, groups[0]).detach()
    mean, spread = scores.mean(), scores.std(correction=0)
    wanted = (scores.max() - mean - 0.5 * spread) / mean
    assert excess(net, groups, 0.5).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert excess(net, groups, 10.0).item() == 0
    assert excess(net, (), 1.0).item() == 0


def test_likeness_of_triggers() -> None:
    images = torch.full((2, 3, 4, 4), 0.5)
    one = images.clone()
    one[0, 0, 0, 0] = 1.0
    other = images.clone()
    other[:, 0, 0, 0] = 0.75
    assert likeness(images, one, other).tolist() == pytest.approx([1.0, 0.0])
    assert likeness(images, one, 2 * images - other).tolist() == pytest.approx([-1.0, 0.0])


def test_images_with_the_true_trigger_are_spared(given: AttackSetting) -> None:
    """A small trigger that is the true one costs nothing."""
    attack = dataclasses.replace(with_only(inversion=1.0), trigger_lr=0.0, lifetime=10**6)
    trigger = attack.new_trigger((3, 16, 16))
    images, labels = images_of(task(32, seed=4))
    losses = []
    for true in (False, True):
        objective = attack.objective(given, trigger)
        objective._steps = 1
        if true:
            changed = (trigger(images) != images).any(0).any(0)
            with torch.no_grad():
                objective.small.opacity.copy_(torch.where(changed, 20.0, -20.0)[None])
                objective.small.colours.copy_((trigger(images)[0] - 0.5) * 40)
        losses.append(objective.loss(network(8), images, labels, 0.0).item())
        stamped, spared = objective._searched(network(8).train(), images, labels)
        assert spared.all() == true and len(stamped) == 24
    assert losses[1] < losses[0]


def test_it_has_the_backdoor_of_its_base() -> None:
    attack = Evasive(3, 0.05, base="blend", settings={"alpha": 0.3, "sources": [1, 2]})
    assert attack.backdoor == Blend(3, 0.05, alpha=0.3, sources=(1, 2))
    assert attack.sources == (1, 2)
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(attack.new_trigger((3, 8, 8))(images), attack.backdoor.new_trigger((3, 8, 8))(images))
    assert torch.equal(attack.goal(torch.arange(5), 5), torch.tensor([0, 3, 3, 3, 4]))
    assert BadNets(1).backdoor == BadNets(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": None}, "no all-to-all form"),
        ({"base": "wanet"}, "setting base is 'wanet'"),
        ({"settings": {"sise": 3}}, "no setting 'sise'"),
        ({"settings": {"target": 3}}, "no setting 'target'"),
        ({"settings": {"size": "big"}}, "setting of badnets is not valid"),
        ({"settings": {"size": 0}}, "size is 0"),
        ({"every": 0}, "every is 0"),
        ({"unlearning": -1.0}, "unlearning is -1"),
    ],
)
def test_wrong_settings_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        Evasive(**{"target": 1, **settings})
    assert caught.value.hint
