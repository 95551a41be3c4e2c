"""Checks that hold for every attack of the registry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import nn

from bdprune.attacks.base import Attack, AttackSetting, CleanLabel, TriggerType, apply_trigger, shape_of
from bdprune.attacks.registry import ATTACKS
from bdprune.errors import OptionError
from bdprune.files.safetensors_file import dump_safetensors, read_safetensors

from .helpers import assert_untouched, frozen, setting, source

KINDS = sorted(ATTACKS)
READY = [kind for kind in KINDS if ATTACKS[kind].trigger_type == "static" or kind in ("wanet", "dfst")]
"""Attacks whose trigger is complete from the start."""
OFFLINE = [kind for kind in KINDS if ATTACKS[kind].objective is Attack.objective and ATTACKS[kind].trains]
"""Attacks that poison the training set and train on it unchanged."""


def attack_of(kind: str, **settings: Any) -> Attack:
    """The attack on target 4, with few steps and a rate that a clean-label attack reaches with ten images."""
    few = {"steps": 2} if kind in ("trojan-neuron", "label-consistent", "feature-collision") else {}
    return ATTACKS[kind](**{"target": 4, "rate": 0.05, **few, **settings})


def given(channels: int = 3) -> AttackSetting:
    return replace(setting(count=120, channels=channels), source=source(channels))


@pytest.mark.parametrize("kind", KINDS)
def test_attacks_describe_themselves(kind: str) -> None:
    assert ATTACKS[kind].kind == kind
    assert ATTACKS[kind].trigger_type in get_args(TriggerType)
    assert ATTACKS[kind].needs_source in (None, "clean", "backdoored")


@pytest.mark.parametrize("settings", [{"rate": -0.1}, {"rate": 1.5}, {"rate": float("nan")}, {"target": -1}])
@pytest.mark.parametrize("kind", KINDS)
def test_settings_out_of_range_are_named(kind: str, settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"setting {next(iter(settings))} is ") as caught:
        attack_of(kind, **settings)
    assert caught.value.hint


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_beyond_the_classes_is_named(kind: str) -> None:
    with pytest.raises(OptionError, match="target is 10, but the images have 10 classes"):
        attack_of(kind, target=10).goal(torch.arange(10), 10)


@pytest.mark.parametrize("kind", OFFLINE)
def test_poisoning_towards_a_target_beyond_the_classes_is_an_error(kind: str) -> None:
    attack = attack_of(kind, target=10)
    with pytest.raises(OptionError, match="target is 10, but the images have 10 classes"):
        attack.poison(given(), attack.new_trigger((3, 16, 16)), torch.Generator())


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_the_target_class_never_count(kind: str) -> None:
    labels = torch.arange(10)
    goal = attack_of(kind).goal(labels, 10)
    counted = (goal != labels).nonzero().flatten().tolist()
    assert counted == ([1] if kind == "feature-collision" else [0, 1, 2, 3, 5, 6, 7, 8, 9])
    assert (goal[counted] == 4).all()


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 16), (3, 33, 20), (1, 32, 32), (3, 64, 64)])
@pytest.mark.parametrize("kind", READY)
def test_triggers_fit_grey_and_colour_images_of_any_size(kind: str, shape: tuple[int, int, int]) -> None:
    images = 0.1 + 0.8 * torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    triggered = apply_trigger(attack_of(kind).new_trigger(shape), images)
    assert triggered.shape == images.shape and triggered.dtype == torch.float32
    assert triggered.min() >= 0 and triggered.max() <= 1
    assert (triggered != images).flatten(1).any(1).all()
    assert torch.equal(images, before)


@pytest.mark.parametrize("kind", READY)
def test_a_trigger_is_the_same_in_train_mode_and_at_every_call(kind: str) -> None:
    trigger = attack_of(kind).new_trigger((3, 16, 16))
    images = torch.rand(4, 3, 16, 16)
    once = trigger.train()(images)
    assert torch.equal(once, trigger.eval()(images))
    assert torch.allclose(once[1:3], trigger(images[1:3]), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_trigger_is_the_same_again(kind: str) -> None:
    one, two = (attack_of(kind).new_trigger((3, 16, 16)).eval() for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in one.state_dict().values():
            if value.is_floating_point():
                value += torch.rand(value.shape, generator=generator) / 10
    images = torch.rand(3, 3, 16, 16, generator=generator)
    assert not torch.equal(apply_trigger(one, images), apply_trigger(two, images))
    tensors, _ = read_safetensors(dump_safetensors(one.state_dict(), {}))
    two.load_state_dict(tensors)
    assert torch.equal(apply_trigger(one, images), apply_trigger(two, images))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", OFFLINE)
def test_poison_changes_only_the_listed_images(kind: str, channels: int) -> None:
    world, attack = given(channels), attack_of(kind)
    assert world.source is not None
    before = frozen(world.source), world.images.clone(), world.labels.clone()
    trigger = attack.new_trigger(shape_of(world.images))
    attack.learn(world, trigger)
    done = attack.poison(world, trigger, torch.Generator().manual_seed(1))
    assert_untouched(world.source, before[0])
    assert torch.equal(world.images, before[1]) and torch.equal(world.labels, before[2])

    assert done.images.dtype == torch.uint8
    assert len(done.triggered) == 6  # 0.05 of 120
    touched = torch.cat([done.triggered, done.covers])
    assert len(touched.unique()) == len(touched)
    changed = (done.images != world.images).flatten(1).any(1).nonzero().flatten()
    assert changed.tolist() == sorted(touched.tolist())
    wanted = world.labels.clone()
    if isinstance(attack, CleanLabel):
        assert (wanted[done.triggered] == 4).all()
    else:
        assert (wanted[done.triggered] != 4).all()
        wanted[done.triggered] = 4
    assert torch.equal(done.labels, wanted)  # covers keep theirs


@pytest.mark.parametrize("kind", OFFLINE)
def test_poison_depends_only_on_its_seed(kind: str) -> None:
    world, attack = given(), attack_of(kind)

    def made(seed: int) -> tuple[torch.Tensor, list[int]]:
        trigger = attack.new_trigger((3, 16, 16))
        attack.learn(world, trigger)
        done = attack.poison(world, trigger, torch.Generator().manual_seed(seed))
        return done.images, done.triggered.tolist()

    torch.manual_seed(5)
    one = made(1)
    torch.manual_seed(6)  # the global random state does not matter
    two, other = made(1), made(2)
    assert torch.equal(one[0], two[0]) and one[1] == two[1]
    assert one[1] != other[1]


@pytest.mark.parametrize("kind", OFFLINE)
def test_rate_zero_poisons_nothing(kind: str) -> None:
    world, attack = given(), attack_of(kind, rate=0.0, **({"cover_rate": 0.0} if kind == "ablend" else {}))
    done = attack.poison(world, attack.new_trigger((3, 16, 16)), torch.Generator())
    assert torch.equal(done.images, world.images) and torch.equal(done.labels, world.labels)
    assert len(done.triggered) == len(done.covers) == 0


@pytest.mark.parametrize("kind", [kind for kind in OFFLINE if not issubclass(ATTACKS[kind], CleanLabel)])
def test_all_to_all_predicts_the_next_label(kind: str) -> None:
    world, attack = given(), attack_of(kind, target=None)
    done = attack.poison(world, attack.new_trigger((3, 16, 16)), torch.Generator().manual_seed(0))
    assert torch.equal(done.labels[done.triggered], (world.labels[done.triggered] + 1) % 10)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if issubclass(ATTACKS[kind], CleanLabel)])
def test_clean_label_attacks_reject_all_to_all_and_poison_only_one_class(kind: str) -> None:
    with pytest.raises(OptionError, match="no all-to-all"):
        attack_of(kind, target=None)
    with pytest.raises(OptionError, match="needs 18 images, but only 12 of 120"):
        attack_of(kind, rate=0.15).poison(given(), nn.Identity(), torch.Generator())


@pytest.mark.parametrize("kind", [kind for kind in OFFLINE if ATTACKS[kind].needs_source])
def test_a_missing_source_is_named(kind: str) -> None:
    attack, world = attack_of(kind), replace(given(), source=None)
    trigger = attack.new_trigger((3, 16, 16))
    with pytest.raises(OptionError, match="needs a trained network"):
        attack.learn(world, trigger)
        attack.poison(world, trigger, torch.Generator())
        attack.start(source(), world)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("badnets", {"size": 0}),
        ("badnets", {"margin": -1}),
        ("blend", {"alpha": 1.1}),
        ("blend", {"pattern": "cat"}),
        ("trojan", {"size": 0}),
        ("trojan", {"margin": -1}),
        ("trojan-neuron", {"neurons": 0}),
        ("trojan-neuron", {"steps": -1}),
        ("sig", {"delta": 2.0}),
        ("sig", {"frequency": -1.0}),
        ("wanet", {"cells": 1}),
        ("wanet", {"strength": -0.5}),
        ("wanet", {"cover_ratio": -1.0}),
        ("ablend", {"cover_rate": 2.0}),
        ("ablend", {"grid": 0}),
        ("ablend", {"kept": 17}),
        ("label-consistent", {"epsilon": 1.5}),
        ("label-consistent", {"steps": -1}),
        ("feature-collision", {"opacity": -0.1}),
        ("feature-collision", {"source_class": -1}),
        ("feature-collision", {"beta": -1.0}),
        ("dynamic", {"lr": -0.01}),
        ("lira", {"lr": float("nan")}),
        ("dfst", {"injector_lr": -0.01}),
        ("awp", {"step": -0.1}),
        ("awp", {"trigger_weight": -1.0}),
        ("adv-t", {"lr": -0.01}),
        ("adv-t", {"padding": -1}),
        ("pruning-aware", {"share": 1.5}),
        ("pruning-aware", {"images": 0}),
    ],
)
def test_bad_settings_of_one_attack_are_named(kind: str, settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"setting {next(iter(settings))} is ") as caught:
        attack_of(kind, **settings)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("kind", "fits", "size"),
    [
        ("badnets", 15, 16),
        ("trojan", 12, 13),
        ("trojan-neuron", 15, 16),
        ("label-consistent", 8, 9),
        ("feature-collision", 15, 16),
    ],
)
def test_a_trigger_larger_than_the_image_is_named(kind: str, fits: int, size: int) -> None:
    attack_of(kind, size=fits).new_trigger((3, 16, 32))
    with pytest.raises(OptionError, match=r"needs \d+x\d+ pixels, but the images are 16x32"):
        attack_of(kind, size=size).new_trigger((3, 16, 32))
