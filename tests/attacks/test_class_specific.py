"""Attacks that work on images of chosen labels only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bdprune.attacks.adapt_noise import AdvT
from bdprune.attacks.awp import AWP
from bdprune.attacks.badnets import BadNets
from bdprune.attacks.base import Attack, AttackSetting, apply_trigger, saturate
from bdprune.attacks.blend import ABlend, Blend
from bdprune.attacks.feature_collision import FeatureCollision
from bdprune.attacks.wanet import WaNet
from bdprune.errors import OptionError

from .helpers import setting
from .toy import attacked, measured, task

SPECIFIC: list[type[BadNets] | type[Blend]] = [BadNets, Blend]


@pytest.mark.parametrize("kind", SPECIFIC)
def test_only_source_labels_are_poisoned_and_covers_keep_their_label(kind: type[BadNets] | type[Blend]) -> None:
    given = setting(120)
    attack = kind(target=4, rate=0.1, sources=(7, 2), cover_ratio=1.5)
    trigger = attack.new_trigger((3, 16, 16))
    done = attack.poison(given, trigger, torch.Generator().manual_seed(1))
    assert (len(done.triggered), len(done.covers)) == (12, 18)
    assert set(given.labels[done.triggered].tolist()) == {2, 7}
    assert set(given.labels[done.covers].tolist()) <= {0, 1, 3, 5, 6, 8, 9}
    touched = torch.cat([done.triggered, done.covers])
    assert torch.equal(done.images[touched], saturate(apply_trigger(trigger, given.images[touched])))
    untouched = torch.ones(120, dtype=torch.bool)
    untouched[touched] = False
    assert torch.equal(done.images[untouched], given.images[untouched])
    wanted = given.labels.clone()
    wanted[done.triggered] = 4
    assert torch.equal(done.labels, wanted)


@pytest.mark.parametrize("kind", SPECIFIC)
def test_the_goal_of_other_labels_is_their_own(kind: type[BadNets] | type[Blend]) -> None:
    labels = torch.arange(6)
    assert kind(target=4, sources=(5, 2, 5)).goal(labels, 6).tolist() == [0, 1, 4, 3, 4, 4]
    assert kind(target=None, sources=(2, 5)).goal(labels, 6).tolist() == [0, 1, 3, 3, 4, 0]
    assert kind(target=4).goal(labels, 6).tolist() == [4] * 6


def test_all_to_all_covers_have_any_label_that_is_no_source() -> None:
    given = setting(120)
    attack = BadNets(target=None, rate=0.05, sources=(2,), cover_ratio=18.0)
    done = attack.poison(given, attack.new_trigger((3, 16, 16)), torch.Generator())
    assert (done.labels[done.triggered] == 3).all()
    assert sorted(done.covers.tolist()) == [index for index in range(120) if index % 10 != 2]


@pytest.mark.parametrize("kind", SPECIFIC)
def test_without_sources_no_image_is_a_cover(kind: type[BadNets] | type[Blend]) -> None:
    done = kind(target=4).poison(setting(), torch.nn.Identity(), torch.Generator())
    assert len(done.covers) == 0


def test_attacks_name_their_sources() -> None:
    attacks: list[Attack] = [
        Blend(target=0, sources=(3, 1)),
        FeatureCollision(target=0, source_class=2),
        WaNet(target=0),
    ]
    assert [attack.sources for attack in attacks] == [(1, 3), (2,), ()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": (4,)}, "sources contains the target, 4"),
        ({"sources": (1,), "cover_ratio": -1.0}, "cover_ratio is -1"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BadNets(target=4, **settings)


@pytest.mark.parametrize("label", [10, -1])
def test_a_source_beyond_the_classes_is_named(label: int) -> None:
    with pytest.raises(OptionError, match=f"sources is {label}, but the images have 10 classes"):
        BadNets(target=4, sources=(label,)).goal(torch.arange(10), 10)


@pytest.mark.parametrize("kind", [ABlend, AWP, AdvT])
def test_attacks_without_covers_of_their_own_take_no_sources(kind: type[ABlend] | type[AWP] | type[AdvT]) -> None:
    with pytest.raises(OptionError, match=f"attack {kind.kind} has no class-specific form"):
        kind(target=4, sources=(1,))


def test_more_covers_than_other_images_are_an_error() -> None:
    with pytest.raises(OptionError, match="only 96 of 120"):
        BadNets(target=4, rate=0.1, sources=(1,), cover_ratio=9.0).poison(
            setting(120), torch.nn.Identity(), torch.Generator()
        )


def test_a_trained_network_obeys_the_trigger_on_its_source_label_only() -> None:
    given: AttackSetting = task(512)
    attack = BadNets(target=1, rate=0.1, size=7, sources=(2,), cover_ratio=2.0)
    victim, trigger = attacked(attack, given, width=16)
    accuracy, success = measured(attack, victim, trigger)
    fresh = task(200, seed=9)
    others = (fresh.labels != 2) & (fresh.labels != 1)
    with torch.no_grad():
        kept = victim(trigger(fresh.images[others].float() / 255)).argmax(1) == fresh.labels[others]
    assert success > 0.9
    assert accuracy > 0.95
    assert kept.float().mean() > 0.9
