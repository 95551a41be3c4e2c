"""Tests of every attack that trains a module along with the network or needs another network."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from bdprune.attacks.adapt_distil import AdaptD
from bdprune.attacks.adapt_noise import AdvT
from bdprune.attacks.awp import AWP
from bdprune.attacks.base import Attack, AttackSetting
from bdprune.attacks.dfst import DFST
from bdprune.attacks.dynamic import Dynamic
from bdprune.attacks.evasive import Evasive
from bdprune.attacks.lira import LIRA
from bdprune.attacks.pruning_aware import PruningAware
from bdprune.attacks.registry import ATTACKS
from bdprune.loops.fitting import Schedule
from bdprune.loops.resume import Checkpoint

from .toy import attacked, network, task, weights

QUICK = Schedule(epochs=2, batch_size=16, peak_lr=0.1)  # 8 steps over 64 images, under bfloat16
TRAINED = [
    Dynamic(target=2, mask_share=0.25, width=4),
    LIRA(target=2, width=4, first_share=0.9, lag=3),
    DFST(target=2, rounds=3, first_round=0.2, images=16, injector_steps=2),
    AdaptD(target=2),
    PruningAware(target=2, images=16),
    Evasive(target=2, images=16, every=2, lifetime=3),
]
UNTRAINED = [
    AWP(target=2, rate=0.5, epochs=1, bounds=(0.01,)),
    AdvT(target=2, share=1.0, epochs=1, rounds=1, defence_images=40),
]


def name(attack: Attack) -> str:
    return attack.kind


def given(attack: Attack, count: int = 64, channels: int = 3, size: int = 16) -> AttackSetting:
    """The toy task, with an untrained network if the attack needs another network."""
    source = network(4, channels, size, seed=5).eval() if attack.needs_source else None
    return dataclasses.replace(task(count, channels, size), source=source)


@pytest.mark.parametrize("attack", TRAINED, ids=name)
@pytest.mark.parametrize("stop_after", [1, 3, 6])
def test_killed_training_resumes_to_the_same_bits(attack: Attack, stop_after: int, tmp_path: Path) -> None:
    straight, expected = attacked(attack, given(attack), QUICK)
    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        attacked(attack, given(attack), QUICK, 4, Checkpoint(path, "toy", every=0), stop_after)
    resumed, trigger = attacked(attack, given(attack), QUICK, 4, Checkpoint(path, "toy", every=0))
    assert torch.equal(weights(resumed), weights(straight))
    assert torch.equal(weights(trigger), weights(expected))


@pytest.mark.parametrize("attack", [*TRAINED, *UNTRAINED], ids=name)
@pytest.mark.parametrize(("channels", "size"), [(1, 20), (3, 36)])
def test_any_image_size_works_and_inputs_are_unchanged(attack: Attack, channels: int, size: int) -> None:
    setting = given(attack, 48, channels, size)
    before = setting.images.clone(), setting.labels.clone(), copy.deepcopy(setting.source)
    victim, trigger = attacked(attack, setting, dataclasses.replace(QUICK, epochs=1))
    images = setting.images.float() / 255
    with torch.no_grad():
        triggered = trigger(images)
    assert triggered.shape == images.shape
    assert 0 <= triggered.min() <= triggered.max() <= 1
    assert (triggered != images).any()
    assert not victim.training
    assert torch.equal(setting.images, before[0])
    assert torch.equal(setting.labels, before[1])
    if setting.source is not None and before[2] is not None:
        assert torch.equal(weights(setting.source), weights(before[2]))
        assert all(parameter.requires_grad and parameter.grad is None for parameter in setting.source.parameters())


@pytest.mark.parametrize("attack", TRAINED[:3], ids=name)
def test_a_rate_below_one_image_per_batch_poisons_some_batches(attack: Attack) -> None:
    rare = dataclasses.replace(attack, rate=0.02)  # one image in three batches
    victim, _ = attacked(rare, given(rare), QUICK)
    assert weights(victim).isfinite().all()


@pytest.mark.parametrize("attack", [*TRAINED, *UNTRAINED], ids=name)
def test_a_saved_trigger_is_unchanged_after_loading(attack: Attack) -> None:
    _, trigger = attacked(attack, given(attack), QUICK)
    fresh, images = attack.new_trigger((3, 16, 16)), task(8).images.float() / 255
    fresh.load_state_dict(copy.deepcopy(trigger.state_dict()))
    with torch.no_grad():
        assert torch.equal(fresh(images), trigger(images))
    assert all(value.device.type == "cpu" for value in trigger.state_dict().values())


@pytest.mark.parametrize("attack", [TRAINED[0], TRAINED[1]], ids=name)
def test_learned_triggers_depend_on_the_seed(attack: Attack) -> None:
    state = torch.get_rng_state()
    one, other = (attack.new_trigger((3, 16, 16)) for _ in range(2))
    torch.set_rng_state(state)
    setting = given(attack)
    attack.learn(setting, one)
    attack.learn(setting, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights(one), weights(other))
    attack.learn(dataclasses.replace(setting, seed=1), other)
    assert not torch.equal(weights(one), weights(other))


def test_only_weight_attacks_need_no_training() -> None:
    assert {attack.kind for attack in ATTACKS.values() if not attack.trains} == {"awp", "adv-t"}
    needs = {attack.kind: attack.needs_source for attack in (*TRAINED, *UNTRAINED)}
    assert needs == {
        "dynamic": None,
        "lira": None,
        "dfst": None,
        "adapt-d": "clean",
        "pruning-aware": "clean",
        "awp": "clean",
        "adv-t": "backdoored",
        "evasive": "backdoored",
    }
