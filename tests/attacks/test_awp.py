import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bdprune.attacks.awp import AWP
from bdprune.attacks.badnets import BadNets
from bdprune.errors import OptionError

from .toy import attacked, measured, network, task, weights


@pytest.fixture(scope="module")
def clean() -> nn.Module:
    """A network that has learned the task and no trigger."""
    return attacked(BadNets(target=0, rate=0.0), task(), width=16)[0]


def moved(victim: nn.Module, source: nn.Module) -> float:
    """The largest change of a parameter."""
    pairs = zip(victim.parameters(), source.parameters(), strict=True)
    return max((one - two).abs().max().item() for one, two in pairs)


QUICK = AWP(target=1, size=7, rate=0.5, epochs=3, batch_size=32, held_out=64, bf16=False)


def test_the_smallest_sufficient_bound_is_used_and_respected(clean: nn.Module) -> None:
    given, before = task(), weights(clean)
    given = dataclasses.replace(given, source=clean)
    attack = dataclasses.replace(QUICK, bounds=(0.03, 1e-4), epochs=25)
    victim, trigger = attacked(attack, given, width=16)
    accuracy, success = measured(attack, victim, trigger)
    assert torch.equal(weights(clean), before)
    assert measured(attack, clean, trigger)[1] < 0.1  # the smaller bound does not suffice
    assert 0.02 < moved(victim, clean) <= 0.03 + 1e-6
    assert success > 0.9
    assert accuracy > 0.95


def test_a_sufficient_bound_ends_the_search(clean: nn.Module) -> None:
    given = dataclasses.replace(task(), source=clean)
    victim, _ = attacked(dataclasses.replace(QUICK, bounds=(0.03, 0.001), success=0.0, max_drop=1.0), given, width=16)
    assert 0 < moved(victim, clean) <= 0.001 + 1e-6


class Scripted(AWP):
    """Moves every weight by the bound, with given outcomes: one before, then one for each bound."""

    outcomes: Iterator[tuple[float, float]]

    def _perturb(self, network: nn.Module, clean: list[Tensor], bound: float, *_: object) -> None:
        with torch.no_grad():
            for parameter, value in zip(network.parameters(), clean, strict=True):
                parameter.copy_(value + bound)

    def _outcome(self, *_: object) -> tuple[float, float]:
        success, accuracy = next(self.outcomes)
        return min(success, self.success), accuracy


@pytest.mark.parametrize(
    ("outcomes", "kept"),
    [
        ([(0.96, 0.80), (0.95, 0.89), (0.99, 0.90)], 0.02),  # the first with both accuracies high
        ([(0.96, 0.80), (0.99, 0.85), (0.95, 0.70)], 0.02),  # the highest clean accuracy among successful bounds
        ([(0.50, 0.90), (0.60, 0.90), (0.93, 0.10)], 0.04),  # the most successful
    ],
)
def test_the_bound_that_is_kept(outcomes: list[tuple[float, float]], kept: float, clean: nn.Module) -> None:
    attack = Scripted(target=1, size=7, bounds=(0.01, 0.02, 0.04), held_out=16)
    object.__setattr__(attack, "outcomes", iter([(0.1, 0.90), *outcomes]))
    victim, _ = attacked(attack, dataclasses.replace(task(), source=clean), width=16)
    assert moved(victim, clean) == pytest.approx(kept, abs=1e-5)


def test_batch_norms_keep_their_statistics(clean: nn.Module) -> None:
    victim, _ = attacked(QUICK, dataclasses.replace(task(), source=clean), width=16)
    for (name, found), wanted in zip(victim.named_buffers(), clean.buffers(), strict=True):
        assert torch.equal(found, wanted), name
    assert not victim.training


def test_first_step_goes_against_the_gradient_of_both_terms() -> None:
    given, source = task(64), network(8).eval()
    given = dataclasses.replace(given, source=source)
    attack = dataclasses.replace(
        QUICK, bounds=(0.01,), step=0.5, epochs=1, batch_size=64, held_out=32, success=0.0, max_drop=1.0
    )
    victim, trigger = attacked(attack, given, width=8)
    used = torch.randperm(64, generator=torch.Generator().manual_seed(0))[32:64]
    images = given.images[used].float() / 255
    kept = source(images).argmax(1)
    loss = nn.functional.cross_entropy(source(images), kept)
    loss = loss + nn.functional.cross_entropy(source(trigger(images)), torch.ones(32, dtype=torch.int64))
    for parameter, found in zip(source.parameters(), victim.parameters(), strict=True):
        (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        sure = gradient.abs() > 1e-5
        assert torch.allclose((found - parameter)[sure], -0.005 * gradient.sign()[sure], atol=1e-5)


def test_the_same_seed_gives_the_same_weights(clean: nn.Module) -> None:
    given = dataclasses.replace(task(), source=clean)
    one, two = (attacked(QUICK, given, width=16)[0] for _ in range(2))
    assert torch.equal(weights(one), weights(two))


def test_no_image_is_poisoned() -> None:
    given = task(16)
    poisoned = QUICK.poison(given, QUICK.new_trigger((3, 16, 16)), torch.Generator())
    assert torch.equal(poisoned.images, given.images)
    assert len(poisoned.triggered) == 0


@pytest.mark.parametrize("wrong", [{"bounds": ()}, {"bounds": (0.0, 0.1)}, {"success": 2.0}, {"epochs": 0}])
def test_settings_out_of_range_are_errors(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        AWP(target=1, **wrong)  # type: ignore[arg-type]
