import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional

from bdprune.attacks.adapt_noise import AdvT, adverse, scales, shifted
from bdprune.attacks.badnets import BadNets
from bdprune.errors import OptionError
from bdprune.model.handle import Model

from .toy import CLASSES, attacked, measured, network, task, weights

ATTACK = AdvT(target=1, size=5, share=1.0, batch_size=32, defence_images=80, rounds=1, least=0.2, padding=0, flip=False)


@pytest.fixture(scope="module")
def backdoored() -> nn.Module:
    return attacked(BadNets(target=1, size=5), task(), width=8)[0]


def test_scales_are_listed_by_filter_group() -> None:
    net = network(4)
    groups = Model(net.eval(), "toy", CLASSES, (3, 16, 16)).groups
    (scale, channels), (other, all_of_them) = scales(net, groups, {"0": [1, 3], "3": list(range(8))})
    assert scale is net[1].weight
    assert channels.tolist() == [1, 3]
    assert other is net[4].weight
    assert all_of_them.tolist() == list(range(8))
    assert [len(index) for _, index in scales(net, groups, {"3": [2]})] == [1]


def test_noise_moves_each_scale_by_eps_up_the_loss_of_its_channels() -> None:
    given, net = task(32), network(4).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    images, before = given.images.float() / 255, weights(net)
    ((scale, change),) = adverse(net, [(net[1].weight, torch.tensor([1, 3]))], images, given.labels, 0.4)
    assert scale is net[1].weight
    assert change[[0, 2]].tolist() == [0, 0]
    assert change[[1, 3]].abs().tolist() == pytest.approx([0.8, 1.2])
    assert torch.equal(weights(net), before)
    judge = copy.deepcopy(net)
    losses = []
    for step in (-0.05, 0.0, 0.05):  # a small part of eps
        with torch.no_grad():
            judge[1].weight.copy_(net[1].weight + step * change)
            losses.append(functional.cross_entropy(judge(images), given.labels).item())
    assert losses[0] < losses[1] < losses[2]


def test_shifted_parameters_are_restored_bit_for_bit() -> None:
    net = network(4)
    before, change = net[1].weight.detach().clone(), torch.rand(4) / 3
    with pytest.raises(KeyError), shifted([(net[1].weight, change)]):
        assert torch.equal(net[1].weight, before + change)
        raise KeyError
    assert torch.equal(net[1].weight, before)


def test_finds_the_filters_that_rnp_would_prune_and_leaves_the_network_unchanged(backdoored: nn.Module) -> None:
    before, given = weights(backdoored), task()
    model = Model(backdoored, "toy", CLASSES, (3, 16, 16))
    found = ATTACK.find(model, given, torch.Generator(), 0)
    assert set(found) <= {"0", "3"}
    assert len(found.get("0", [])) + len(found.get("3", [])) >= 5  # a fifth of 24
    assert torch.equal(weights(backdoored), before)


def test_keeps_both_tasks_and_makes_the_found_filters_robust_to_noise(backdoored: nn.Module) -> None:
    """After fine-tuning, noise on the scales of the filters costs less clean accuracy."""
    given, before = dataclasses.replace(task(), source=backdoored), weights(backdoored)
    victim, trigger = attacked(ATTACK, given, width=8)
    accuracy, success = measured(ATTACK, victim, trigger)
    assert accuracy > 0.9
    assert success > 0.7
    assert torch.equal(weights(backdoored), before)
    assert not torch.equal(weights(victim), before)
    assert not victim.training

    generator = torch.Generator().manual_seed(given.seed)
    model = Model(copy.deepcopy(backdoored), "toy", CLASSES, (3, 16, 16))
    found = ATTACK.find(model, given, generator, given.seed)
    fresh = task(200, seed=9)
    images, losses = fresh.images.float() / 255, []
    for net in (backdoored, victim):
        noisy = scales(net, model.groups, found)
        with shifted(adverse(net, noisy, images, fresh.labels, 0.4)), torch.no_grad():
            losses.append(functional.cross_entropy(net(images), fresh.labels).item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize("target", [1, None])
def test_replay_poisons_exactly_its_share_of_a_batch(target: int | None) -> None:
    attack, given = AdvT(target=target, rate=0.25), task(32)
    images, trigger = given.images.float() / 255, attack.new_trigger((3, 16, 16))
    replayed, taught = attack._replay(images, given.labels, trigger, CLASSES)
    changed = (replayed != images).flatten(1).any(1)
    assert changed.sum() == 8
    goal = attack.goal(given.labels, CLASSES)
    assert (goal != given.labels)[changed].all()
    assert torch.equal(replayed, torch.where(changed.view(-1, 1, 1, 1), trigger(images), images))
    assert torch.equal(taught, torch.where(changed, goal, given.labels))


def test_the_same_seed_gives_the_same_weights(backdoored: nn.Module) -> None:
    given = dataclasses.replace(task(), source=backdoored)
    one, two = (attacked(dataclasses.replace(ATTACK, epochs=1), given, width=8)[0] for _ in range(2))
    assert torch.equal(weights(one), weights(two))


def test_the_training_set_is_unchanged() -> None:
    given = task(16)
    assert torch.equal(ATTACK.poison(given, ATTACK.new_trigger((3, 16, 16)), torch.Generator()).images, given.images)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"share": 1.5}, {"max_drop": -0.1}, {"eps": -1.0}])
def test_settings_out_of_range_are_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        AdvT(target=1, **wrong)  # type: ignore[arg-type]
