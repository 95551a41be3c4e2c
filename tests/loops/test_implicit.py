from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from bdprune.errors import TrainingError
from bdprune.loops import implicit
from bdprune.loops.implicit import ImplicitSettings, hypergradient, search_loss, unlearn_perturbations
from bdprune.model import Model
from bdprune.runtime.evaluate import clean_accuracy

QUICK = ImplicitSettings(rounds=2, batch_size=60, share=0.3)


def _small() -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    images = torch.rand(8, 3, 2, 2, dtype=torch.float64)
    delta = torch.randn(1, 3, 2, 2, dtype=torch.float64) / 5
    return module, images, torch.arange(8) % 3, delta


def test_the_hypergradient_is_that_of_unrolled_steps_of_the_map() -> None:
    """K steps of the map around its fixed point, differentiated by autograd, with the map linear near delta."""
    module, images, labels, delta = _small()
    settings = ImplicitSettings(steps=3, step_size=0.1, penalty=0.01)
    hypergradient(module, (images, labels), (images, labels, 4), delta, settings)
    found = torch.cat([one.grad.flatten() for one in module.parameters() if one.grad is not None])

    parameters = list(module.parameters())
    point = delta.clone().requires_grad_()
    outer = functional.cross_entropy(module(torch.cat([images[:4] + point, images[4:]])), labels)
    direct = torch.autograd.grad(outer, point, retain_graph=True)[0].flatten()
    plain = torch.cat([one.flatten() for one in torch.autograd.grad(outer, parameters)])
    hessian = torch.autograd.functional.hessian(
        lambda one: search_loss(module, images, labels, one, settings.penalty), delta
    ).reshape(12, 12)
    jacobian = torch.eye(12, dtype=torch.float64) - settings.step_size * hessian
    vector = sum(torch.matrix_power(jacobian.T, power) @ direct for power in range(4))
    slope = torch.autograd.grad(search_loss(module, images, labels, point, settings.penalty), point, create_graph=True)[
        0
    ].flatten()
    mixed = torch.autograd.grad(slope @ vector, parameters)
    wanted = plain - settings.step_size * torch.cat([one.flatten() for one in mixed])
    torch.testing.assert_close(found, wanted)


def test_without_fixed_point_steps_it_is_the_plain_gradient() -> None:
    module, images, labels, delta = _small()
    hypergradient(module, (images, labels), (images, labels, 8), delta, ImplicitSettings(steps=0))
    wanted = torch.autograd.grad(functional.cross_entropy(module(images + delta), labels), list(module.parameters()))
    for parameter, gradient in zip(module.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_network_changes_and_stays_accurate_but_not_its_statistics(bright: Any) -> None:
    before = {name: value.clone() for name, value in bright.model.network.state_dict().items()}
    tuned = unlearn_perturbations(bright.model, bright.data, QUICK)
    state = bright.model.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in before.items())
    after = tuned.network.state_dict()
    assert torch.equal(after["1.running_mean"], before["1.running_mean"])
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert clean_accuracy(tuned.module, bright.data.images, bright.data.labels) > 0.8


@pytest.mark.parametrize("count", [1, 5])
def test_at_least_one_image_of_a_step_carries_the_perturbation(
    bright: Any, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundredth of a few images must not be none."""
    carried = []

    def note(module: nn.Module, inner: Any, outer: Any, delta: torch.Tensor, settings: ImplicitSettings) -> Any:
        carried.append((outer[2], bool(delta.any())))
        return hypergradient(module, inner, outer, delta, settings)

    monkeypatch.setattr("bdprune.loops.implicit.hypergradient", note)
    few = bright.data.subset(torch.arange(count))
    unlearn_perturbations(bright.model, few, replace(QUICK, share=0.01))
    assert carried == [(1, True)] * QUICK.rounds


def test_every_batch_has_its_own_search_loss(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def note(module: nn.Module, inner: Any, outer: Any, delta: torch.Tensor, settings: ImplicitSettings) -> Any:
        seen.append(inner[0])
        return hypergradient(module, inner, outer, delta, settings)

    monkeypatch.setattr("bdprune.loops.implicit.hypergradient", note)
    unlearn_perturbations(bright.model, bright.data, replace(QUICK, rounds=1))
    assert len(seen) == 4 and not torch.equal(seen[0], seen[1])


def test_a_loss_that_is_not_finite_is_an_error(bright: Any) -> None:
    with pytest.raises(TrainingError, match="The loss of the unlearning is"):
        unlearn_perturbations(bright.model, bright.data, replace(QUICK, lr=1e30, search_lr=1e30))


class Attentive(nn.Module):
    """Attention over the pixels of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.conv(images).flatten(2).mT
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def test_attention_has_second_derivatives(bright: Any) -> None:
    torch.manual_seed(0)
    model = Model(Attentive(), "attentive", 3, (3, 8, 8))
    found = unlearn_perturbations(model, bright.data, QUICK)
    assert not torch.equal(found.network.get_parameter("head.weight"), model.network.get_parameter("head.weight"))


def test_a_layer_without_second_derivatives_is_named(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> torch.Tensor:
        raise RuntimeError("derivative for aten::odd_backward is not implemented")

    monkeypatch.setattr(implicit, "hypergradient", fail)
    with pytest.raises(TrainingError, match="aten::odd_backward is not implemented"):
        unlearn_perturbations(bright.model, bright.data, QUICK)
    monkeypatch.setattr(implicit, "hypergradient", lambda *args: (_ for _ in ()).throw(RuntimeError("other")))
    with pytest.raises(RuntimeError, match="other"):
        unlearn_perturbations(bright.model, bright.data, QUICK)
