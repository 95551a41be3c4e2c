"""Common parts of attacks with dirty labels."""

import pytest
import torch

from bdprune.attacks.badnets import BadNets
from bdprune.attacks.base import apply_trigger, draw, saturate, shape_of
from bdprune.attacks.blend import Blend
from bdprune.errors import OptionError

from .helpers import setting

ATTACKS = [BadNets(target=4, rate=0.25), Blend(target=4, rate=0.25)]


@pytest.mark.parametrize("attack", ATTACKS)
def test_poison_changes_exactly_the_drawn_share(attack: BadNets | Blend) -> None:
    given = setting()
    trigger = attack.new_trigger(shape_of(given.images))
    poisoned = attack.poison(given, trigger, torch.Generator().manual_seed(1))
    changed = (poisoned.images != given.images).flatten(1).any(1)
    assert poisoned.images.dtype == torch.uint8
    assert sorted(poisoned.triggered.tolist()) == changed.nonzero().flatten().tolist()
    assert len(poisoned.triggered) == 10
    assert len(poisoned.covers) == 0
    assert (poisoned.labels[changed] == 4).all()
    assert (given.labels[changed] != 4).all()
    assert torch.equal(poisoned.labels[~changed], given.labels[~changed])
    assert torch.equal(poisoned.images[changed], saturate(apply_trigger(trigger, given.images[changed])))


@pytest.mark.parametrize("attack", [BadNets(target=None, rate=0.25), Blend(target=None, rate=0.25)])
def test_all_to_all_moves_every_label_one_up(attack: BadNets | Blend) -> None:
    given = setting()
    poisoned = attack.poison(given, attack.new_trigger((3, 16, 16)), torch.Generator().manual_seed(1))
    assert len(poisoned.triggered) == 10
    before, after = given.labels[poisoned.triggered], poisoned.labels[poisoned.triggered]
    assert torch.equal(after, (before + 1) % 10)
    assert attack.goal(torch.tensor([0, 8, 9]), 10).tolist() == [1, 9, 0]


def test_poison_is_reproducible_from_its_seed() -> None:
    given, attack = setting(), BadNets(target=4, rate=0.25)
    trigger = attack.new_trigger((3, 16, 16))
    one, two, other = (attack.poison(given, trigger, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.labels, two.labels)
    assert not torch.equal(one.images, other.images)


def test_the_setting_and_the_images_are_unchanged() -> None:
    given = setting()
    before = given.images.clone(), given.labels.clone()
    for attack in ATTACKS:
        trigger = attack.new_trigger((3, 16, 16))
        attack.poison(given, trigger, torch.Generator())
        images = given.images.float() / 255
        trigger(images)
        assert torch.equal(images, before[0].float() / 255)
    assert torch.equal(given.images, before[0])
    assert torch.equal(given.labels, before[1])


def test_saved_triggers_load_into_new_triggers() -> None:
    one, two = Blend(target=0, pattern_seed=1).new_trigger((3, 8, 8)), Blend(target=0).new_trigger((3, 8, 8))
    images = torch.rand(2, 3, 8, 8)
    assert not torch.equal(one(images), two(images))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(images), two(images))


def test_bytes_saturate() -> None:
    assert saturate(torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5])).tolist() == [0, 0, 128, 255, 255]


def test_more_images_to_poison_than_candidates_is_an_error() -> None:
    with pytest.raises(OptionError, match="needs 40 images, but only 36 of 40"):
        draw(torch.arange(40) % 10 != 0, 1.0, torch.Generator())
