from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from bdprune.attacks.base import apply_trigger, saturate
from bdprune.attacks.feature_collision import FeatureCollision, collide
from bdprune.attacks.features import penultimate
from bdprune.errors import OptionError

from .helpers import assert_untouched, frozen, setting, source


def linear(weight: torch.Tensor) -> nn.Sequential:
    """A network whose features are ``weight @ image``."""
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(weight.shape[1], len(weight), bias=False), nn.Linear(len(weight), 2)
    )
    with torch.no_grad():
        network[1].weight.copy_(weight)
    return network.eval()


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_splitting_finds_the_minimum(beta: float) -> None:
    """For linear features the minimum solves (A'A + beta I) x = A'c + beta b."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 16, generator=generator)
    bases = 0.4 + 0.2 * torch.rand(5, 1, 4, 4, generator=generator)
    centre = weight @ torch.full((16,), 0.5) + 0.1
    a, b, c = weight.double(), bases.flatten(1).double(), centre.double()
    expected = torch.linalg.solve(a.T @ a + beta * torch.eye(16).double(), (a.T @ c + beta * b).T).T
    assert expected.min() > 0 and expected.max() < 1  # so clipping changes nothing
    found = collide(linear(weight), bases, centre, beta, step_size=1.0, steps=300)
    assert torch.allclose(found.flatten(1).double(), expected, atol=2e-3)
    assert (found - bases).abs().max() > 0.02


def test_splitting_stays_in_range_and_never_gets_worse() -> None:
    network, bases = source(), torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    before = frozen(network)
    with torch.no_grad():
        centre = penultimate(network, torch.rand(1, 3, 16, 16))[0] + 0.5
    for step_size in (0.01, 1e4):  # far too small, far too large
        found = collide(network, bases, centre, 0.5, step_size, 8)
        assert found.min() >= 0 and found.max() <= 1
        with torch.no_grad():
            at_start = (penultimate(network, bases) - centre).square().sum(1)
            at_end = (penultimate(network, found) - centre).square().sum(1)
            assert (at_end + 0.5 * (found - bases).square().flatten(1).sum(1) <= at_start + 1e-4).all()
            assert (at_end < at_start).float().mean() > 0.9
    assert_untouched(network, before)


def test_poison_contains_watermarks_of_the_source_class_and_the_trigger() -> None:
    given = replace(setting(count=40, classes=10), source=source())
    given = replace(given, labels=torch.where(given.labels == 1, 2, given.labels))
    given.labels[7] = 1  # the only image of its class
    attack = FeatureCollision(target=4, rate=0.1, steps=0, opacity=0.3, size=5)
    trigger = attack.new_trigger((3, 16, 16))
    done = attack.poison(given, trigger, torch.Generator().manual_seed(0))
    bases = given.images[done.triggered].float() / 255
    expected = saturate(apply_trigger(trigger, 0.7 * bases + 0.3 * given.images[7:8].float() / 255))
    assert torch.equal(done.images[done.triggered], expected)
    assert (given.labels[done.triggered] == 4).all() and torch.equal(done.labels, given.labels)


def test_poison_looks_like_the_source_class_to_the_network() -> None:
    given = replace(setting(count=60), source=source())
    assert given.source is not None
    trigger = FeatureCollision(target=4).new_trigger((3, 16, 16))
    with torch.no_grad():
        centre = penultimate(given.source, apply_trigger(trigger, given.images[given.labels == 1])).mean(0)

    def distance(steps: int) -> torch.Tensor:
        attack = FeatureCollision(target=4, rate=0.1, steps=steps, beta=0.0, step_size=50.0)
        done = attack.poison(given, trigger, torch.Generator().manual_seed(0))
        with torch.no_grad():
            found = penultimate(given.source, done.images[done.triggered].float() / 255)
        return (found - centre).norm(dim=1)

    assert (distance(30) < 0.6 * distance(0)).all()


def test_only_the_source_class_is_triggered() -> None:
    attack = FeatureCollision(target=4, source_class=2)
    assert attack.goal(torch.tensor([0, 1, 2, 3, 4, 2]), 5).tolist() == [0, 1, 4, 3, 4, 4]


def test_impossible_source_classes_are_named() -> None:
    with pytest.raises(OptionError, match="both 4"):
        FeatureCollision(target=4, source_class=4)
    with pytest.raises(OptionError, match="source_class is 10, but the images have 10 classes"):
        FeatureCollision(target=4, source_class=10).goal(torch.arange(10), 10)
    given = replace(setting(), source=source(), num_classes=12)
    with pytest.raises(OptionError, match="No image has the source class 11"):
        FeatureCollision(target=4, source_class=11).poison(given, nn.Identity(), torch.Generator())
