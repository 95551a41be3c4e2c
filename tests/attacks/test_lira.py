import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional

from bdprune.attacks.generators import Change
from bdprune.attacks.lira import LIRA
from bdprune.errors import OptionError

from .toy import CLASSES, SCHEDULE, attacked, measured, network, task, weights


def loud(attack: LIRA) -> Change:
    """A trigger whose changes are far from zero."""
    trigger = attack.new_trigger((3, 16, 16))
    nn.init.normal_(trigger.change.last.weight, std=5.0)
    return trigger


@pytest.mark.parametrize("eps", [2 / 255, 0.1])
def test_trigger_changes_no_pixel_by_more_than_eps(eps: float) -> None:
    images, trigger = torch.rand(4, 3, 16, 16), loud(LIRA(target=0, width=4, eps=eps))
    expected = (images + eps * torch.tanh(trigger.change(images))).clamp(0, 1)
    assert torch.allclose(trigger(images), expected)
    assert 0.9 * eps < (trigger(images) - images).abs().max() <= eps + 1e-6


def test_victims_are_a_share_of_the_batch_without_the_target_class() -> None:
    given, attack = task(20), LIRA(target=1, rate=0.25, width=4)
    objective = attack.objective(given, attack.new_trigger((3, 16, 16)))
    images = given.images.float() / 255
    victims, wanted = objective.victims(images, given.labels)
    assert torch.equal(victims, images[[0, 2, 3, 4, 6]])
    assert wanted.tolist() == [1] * 5
    everyone = LIRA(target=None, rate=0.1, width=4).objective(given, attack.new_trigger((3, 16, 16)))
    assert everyone.victims(images, given.labels)[1].tolist() == [1, 2]


def test_loss_weighs_every_image_by_alpha() -> None:
    given, attack = task(20), LIRA(target=1, rate=0.25, alpha=0.8, width=4)
    trigger, net = loud(attack), network().eval()
    images = given.images.float() / 255
    found = attack.objective(given, trigger).loss(net, images, given.labels, 0.9)
    with torch.no_grad():
        triggered = trigger(images[[0, 2, 3, 4, 6]])
    clean = functional.cross_entropy(net(images), given.labels, reduction="sum")
    poisoned = functional.cross_entropy(net(triggered), torch.ones(5, dtype=torch.int64), reduction="sum")
    assert found.item() == pytest.approx(((0.8 * clean + 0.2 * poisoned) / (0.8 * 20 + 0.2 * 5)).item(), rel=1e-5)


def test_the_trigger_descends_its_loss_and_leaves_the_network_unchanged() -> None:
    given, attack = task(16), LIRA(target=1, rate=1.0, width=4, eps=0.2, lr=0.01)
    trigger, net = attack.new_trigger((3, 16, 16)), network().train()
    objective = attack.objective(given, trigger)
    images, before = given.images.float() / 255, weights(net)
    wanted = torch.ones(16, dtype=torch.int64)
    first = objective.trigger_loss(net, images, wanted)
    for _ in range(20):
        objective._companion.descend(objective.trigger_loss(net, images, wanted))
    assert objective.trigger_loss(net, images, wanted) < first - 0.05
    assert torch.equal(weights(net), before)
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_copy_is_updated_on_schedule_and_the_second_stage_freezes_the_trigger() -> None:
    given, attack = task(16), LIRA(target=1, rate=0.5, width=4, first_share=0.5, lag=3)
    trigger, net = attack.new_trigger((3, 16, 16)), network().train()
    objective = attack.objective(given, trigger)
    images = given.images.float() / 255
    caught_up = []
    for done in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        before = weights(trigger)
        objective.loss(net, images, given.labels, done)
        assert torch.equal(before, weights(trigger)) is (done >= 0.5)
        caught_up.append(torch.equal(weights(trigger), weights(objective._lagging)))
    assert caught_up == [True, False, False, True, False, True, True]


@pytest.mark.parametrize("bf16", [False, True])
def test_every_weight_of_the_network_learns_from_the_loss(bf16: bool) -> None:
    """Also under autocast, whose weight cache the earlier step of the trigger fills."""
    given, attack = task(16), LIRA(target=1, rate=0.5, width=4)
    net = network().train()
    gradients = []
    for objective in (attack.objective(given, attack.new_trigger((3, 16, 16))), None):
        twin = copy.deepcopy(net)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if objective is None:
                loss = functional.cross_entropy(twin(given.images.float() / 255).float(), given.labels)
            else:
                loss = objective.loss(twin, given.images.float() / 255, given.labels, 0.0)
        loss.backward()
        gradients.append([parameter.grad for parameter in twin.parameters()])
    for with_trigger, plain in zip(*gradients, strict=True):
        assert with_trigger is not None
        assert plain is not None
        assert 0.1 < with_trigger.norm() / plain.norm() < 10


def test_learns_an_invisible_trigger() -> None:
    attack = LIRA(target=1, rate=0.25, width=4, eps=0.1, lag=20)
    victim, trigger = attacked(attack, task(), dataclasses.replace(SCHEDULE, epochs=8), width=8)
    accuracy, success = measured(attack, victim, trigger)
    assert accuracy > 0.95
    assert success > 0.9


def test_all_to_all_moves_labels_one_up() -> None:
    attack = LIRA(target=None, rate=0.5, width=4, eps=0.2, lag=20)
    victim, trigger = attacked(attack, task(), dataclasses.replace(SCHEDULE, epochs=12), width=8)
    fresh = task(80, seed=9)
    images = fresh.images.float() / 255
    with torch.no_grad():
        assert (victim(trigger(images)).argmax(1) == (fresh.labels + 1) % CLASSES).float().mean() > 0.6


@pytest.mark.parametrize("wrong", [{"eps": 8}, {"alpha": 1.1}, {"first_share": -0.1}, {"lag": 0}, {"width": 0}])
def test_settings_out_of_range_are_errors(wrong: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        LIRA(target=1, **wrong)
