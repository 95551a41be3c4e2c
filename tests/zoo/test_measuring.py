"""Clean accuracy and attack success rate are counted correctly, without the errors of RNP's released protocol."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bdprune.attacks.badnets import BadNets
from bdprune.attacks.base import Attack, apply_trigger
from bdprune.attacks.feature_collision import FeatureCollision
from bdprune.attacks.registry import ATTACKS
from bdprune.data.parquet import RawImages
from bdprune.runtime.evaluate import attack_success_rate, clean_accuracy, robust_accuracy
from bdprune.zoo.making import measure


class Reads(nn.Module):
    """Predicts the label that the first pixel encodes, in tenths; ``target`` if the patch's first pixel is white."""

    def __init__(self, target: int, works_on: tuple[int, ...]) -> None:
        super().__init__()
        self.target, self.works_on = target, works_on
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        read = (images[:, 0, 0, 0] * 10).round().long()
        fooled = (images[:, 0, 4, 4] > 0.9) & torch.isin(read, torch.tensor(self.works_on))
        return nn.functional.one_hot(torch.where(fooled, self.target, read), 10).float()


def world() -> RawImages:
    """Forty black images with labels 0 to 3 in turn; the first pixel encodes the label."""
    labels = torch.arange(40) % 4
    images = torch.zeros(40, 3, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = (labels * 25.5).round().to(torch.uint8)
    return RawImages(images, labels)


def test_clean_accuracy_counts_all_classes() -> None:
    """A network that never predicts the target label is wrong on a quarter of the images."""
    test = world()
    images = test.images.clone()
    images[test.labels == 3, 0, 0, 0] = 0
    found = measure(Reads(0, ()), RawImages(images, test.labels), 4, BadNets(target=3), nn.Identity())
    assert found.clean_accuracy == 0.75


def test_the_success_rate_excludes_the_target_class_and_is_given_per_class() -> None:
    attack = BadNets(target=3, size=3, margin=1)  # the patch begins at pixel 4, 4 of an image of 8x8
    found = measure(Reads(3, (0, 2, 3)), world(), 5, attack, attack.new_trigger((3, 8, 8)))
    assert found.clean_accuracy == 1
    assert found.attack_success_rate == pytest.approx(2 / 3)  # with class 3 it would be 3/4
    assert found.robust_accuracy == pytest.approx(1 / 3)
    assert found.class_success == (1, 0, 1, None, None)
    assert found.cover_accuracy is None


def test_an_attack_from_one_class_counts_only_that_class() -> None:
    attack = FeatureCollision(target=3, source_class=1, size=3, margin=1)
    found = measure(Reads(3, (1,)), world(), 4, attack, attack.new_trigger((3, 8, 8)))
    assert (found.attack_success_rate, found.robust_accuracy) == (1, 0)
    assert found.class_success == (None, 1, None, None)
    assert found.cover_accuracy == 1


@pytest.mark.parametrize(("works_on", "success", "cover"), [((1,), 0.5, 1), ((1, 2), 1, 1), ((0, 1, 2), 1, 0)])
def test_an_attack_on_some_labels_is_measured_on_these_and_on_the_others(
    works_on: tuple[int, ...], success: float, cover: float
) -> None:
    attack = BadNets(target=3, sources=(1, 2), size=3, margin=1)
    found = measure(Reads(3, works_on), world(), 4, attack, attack.new_trigger((3, 8, 8)))
    assert (found.attack_success_rate, found.robust_accuracy) == (success, 1 - success)
    assert found.class_success == (None, 1, 1 if 2 in works_on else 0, None)
    assert found.cover_accuracy == cover


def test_an_all_to_all_attack_on_some_labels_has_all_others_as_covers() -> None:
    attack = BadNets(target=None, sources=(1, 2), size=3, margin=1)
    found = measure(Reads(2, (1, 3)), world(), 4, attack, attack.new_trigger((3, 8, 8)))
    assert found.attack_success_rate == 0.5  # label 1 becomes 2, label 2 stays
    assert found.cover_accuracy == 0.5  # label 0 stays, label 3 becomes 2


def test_clean_models_have_clean_accuracy_only() -> None:
    found = measure(Reads(0, ()), world(), 4)
    assert (found.clean_accuracy, found.attack_success_rate, found.class_success) == (1, None, ())


def test_measurements_equal_the_shared_functions(device: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).to(device).eval()
    test = RawImages(torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8), torch.arange(60) % 4)
    images, attack = test.images.float() / 255, BadNets(target=None, size=5)
    trigger, goal = attack.new_trigger((3, 8, 8)), attack.goal(test.labels, 4)
    found = measure(network, test, 4, attack, trigger)
    given = (network, images, test.labels, trigger, goal)
    assert found.clean_accuracy == pytest.approx(clean_accuracy(*given[:3]))
    assert found.attack_success_rate == pytest.approx(attack_success_rate(*given))
    assert found.robust_accuracy == pytest.approx(robust_accuracy(*given))


@pytest.mark.parametrize("kind", ATTACKS)
def test_no_trigger_is_ever_drawn_again(kind: str) -> None:
    """An image always gives the same triggered image: alone or in a batch, after any random draws."""
    attack: Attack = ATTACKS[kind](target=0)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    trigger = attack.new_trigger((3, 32, 32)).eval()
    first = apply_trigger(trigger, images)
    torch.rand(7)
    again = attack.new_trigger((3, 32, 32)).eval()
    if kind in ("dynamic", "lira"):  # networks, which come from files
        again.load_state_dict(trigger.state_dict())
    assert torch.equal(apply_trigger(trigger, images), first)
    assert torch.equal(apply_trigger(again, images), first)
    assert torch.allclose(torch.cat([apply_trigger(trigger, image[None]) for image in images]), first, atol=1e-5)
