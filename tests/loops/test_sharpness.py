import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from bdprune.loops.finetune import FineTuneSettings, fine_tune
from bdprune.loops.sharpness import SharpnessAware, adaptive_shift


def _batch(bright: Any, count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return bright.data.images[:count], bright.data.labels[:count]


def test_the_gradient_is_that_at_the_worst_weights_nearby(bright: Any) -> None:
    images, labels = _batch(bright)
    module = bright.model.clone().module.train()
    objective = SharpnessAware(rho=0.5, smoothing=0.1)
    objective.start(module)
    before = copy.deepcopy(module)
    loss = objective.backward(module, images, labels)

    def gradients(of: Any) -> list[torch.Tensor]:
        value = functional.cross_entropy(of(images), labels, label_smoothing=0.1)
        return list(torch.autograd.grad(value, list(of.parameters())))

    plain = copy.deepcopy(before)
    first = gradients(plain)
    flat = torch.cat([(w.detach().abs() * g).flatten() for w, g in zip(plain.parameters(), first, strict=True)])
    moved = copy.deepcopy(before)
    with torch.no_grad():
        for weight, gradient in zip(moved.parameters(), first, strict=True):
            weight += 0.5 * weight**2 * gradient / flat.norm()
    for found, wanted in zip(module.parameters(), gradients(moved), strict=True):
        assert found.grad is not None
        torch.testing.assert_close(found.grad, wanted, rtol=1e-4, atol=1e-6)
    expected = functional.cross_entropy(copy.deepcopy(before)(images), labels, label_smoothing=0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_weights_are_restored_and_statistics_move_once(bright: Any) -> None:
    images, labels = _batch(bright)
    module, once = bright.model.clone().module.train(), bright.model.clone().module.train()
    objective = SharpnessAware(rho=2.0, smoothing=0.0)
    objective.start(module)
    objective.backward(module, images, labels)
    once(images)
    state = module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in once.state_dict().items())


def test_a_zero_gradient_does_not_move() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    (shift,) = adaptive_shift([weight], 2.0)
    assert shift.tolist() == [0, 0, 0]


def test_without_radius_it_is_plain_fine_tuning(bright: Any) -> None:
    settings = FineTuneSettings(epochs=1, padding=0)
    plain = fine_tune(bright.model, bright.data, settings, precision="float32")
    same = fine_tune(bright.model, bright.data, settings, precision="float32", objective=SharpnessAware(0.0, 0.0))
    state = same.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.network.state_dict().items())
    wide = SharpnessAware(2.0, 0.0)
    other = fine_tune(bright.model, bright.data, replace(settings), precision="float32", objective=wide)
    assert not torch.equal(other.network.get_parameter("0.weight"), plain.network.get_parameter("0.weight"))
