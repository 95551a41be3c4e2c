from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from bdprune.data import RawImages
from bdprune.errors import OptionError
from bdprune.loops.fitting import Schedule, fit
from bdprune.loops.isolation import Ascent, IsolationSettings, Trapping, isolate


def _logits() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network that returns its input, and logits with losses of about 0.05 and 2."""
    return nn.Identity(), torch.tensor([[3.0, 0.0], [0.0, 1.9]]), torch.tensor([0, 0])


def test_local_gradient_ascent_climbs_only_for_images_below_the_level() -> None:
    network, logits, labels = _logits()
    logits.requires_grad_()
    easy, hard = functional.cross_entropy(logits, labels, reduction="none").tolist()
    assert easy < 0.5 < hard
    loss = Trapping(IsolationSettings(loss="ascent", level=0.5)).loss(network, logits, labels, 0.0)
    assert loss.item() == pytest.approx((hard - easy) / 2, rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] > 0 > logits.grad[1, 0]  # a step down the gradient lowers the right logit of the easy one


def test_the_mean_of_a_batch_decides_in_the_published_code() -> None:
    network, logits, labels = _logits()
    mean = functional.cross_entropy(logits, labels).item()
    for level, sign in ((mean - 0.3, 1), (mean + 0.3, -1)):
        loss = Trapping(IsolationSettings(level=level)).loss(network, logits, labels, 0.0)
        assert loss.item() == pytest.approx(sign * mean, rel=1e-5)


def test_flooding_turns_around_at_the_level_of_the_mean() -> None:
    network, logits, labels = _logits()
    mean = functional.cross_entropy(logits, labels).item()
    for level in (mean - 0.3, mean + 0.3):
        loss = Trapping(IsolationSettings(loss="flooding", level=level)).loss(network, logits, labels, 0.0)
        assert loss.item() == pytest.approx(abs(mean - level) + level, rel=1e-5)


def test_the_images_with_the_lowest_losses_are_isolated(bright: Any) -> None:
    pixels = (bright.data.images * 255).round().to(torch.uint8)
    labels = bright.data.labels.clone()
    labels[:200] = (labels[:200] + 1) % 3  # wrong labels have high losses
    rest, isolated = isolate(bright.model.clone().module, RawImages(pixels, labels), 10)
    assert len(isolated.labels) == 10 and len(rest.labels) == 230
    losses = functional.cross_entropy(bright.model.module(pixels.float() / 255), labels, reduction="none")
    chosen = losses.argsort(stable=True)[:10].sort().values
    assert chosen.min() >= 200
    assert torch.equal(isolated.images, pixels[chosen]) and torch.equal(isolated.labels, labels[chosen])


def test_ascent_raises_the_loss_of_the_isolated_images(bright: Any) -> None:
    pixels = (bright.data.images[:24] * 255).round().to(torch.uint8)
    settings = IsolationSettings(unlearn_lr=0.1, unlearn_epochs=15)
    network = bright.model.clone().module
    schedule = settings.last(Schedule(batch_size=128, padding=0, bf16=False), 24)
    assert schedule is not None and schedule.batch_size == 24
    before = functional.cross_entropy(network(pixels.float() / 255), bright.data.labels[:24]).item()
    fit(network, RawImages(pixels, bright.data.labels[:24]), schedule, 0, objective=Ascent())
    assert functional.cross_entropy(network(pixels.float() / 255), bright.data.labels[:24]).item() > before + 0.1


def test_the_parts_have_constant_rates() -> None:
    settings, schedule = IsolationSettings(), Schedule(epochs=9, peak_lr=0.1)
    first, last = settings.first(schedule), settings.last(schedule, 500)
    assert (first.epochs, first.peak_lr, first.policy, first.milestones) == (20, 0.1, "steps", ())
    assert last is not None and (last.epochs, last.peak_lr, last.batch_size) == (5, 5e-4, 128)
    assert IsolationSettings(unlearn_epochs=0).last(schedule, 500) is None
    assert settings.count(50_000) == 500 and settings.count(10) == 1


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.0}, {"level": 0.0}, {"epochs": 0}, {"unlearn_lr": -1.0}])
def test_a_number_out_of_its_range_is_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="out of range"):
        IsolationSettings(**wrong)
