"""The plain form, without layers that change nothing; and running statistics taken again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdprune.analysis.unlearned import plain_form, with_own_statistics
from bdprune.data.clean import CleanData
from bdprune.model.handle import Model


def idle_norm(kind: type[nn.Module], channels: int, mean: float = 0.0, var: float = 1.0) -> nn.Module:
    """Returns its input in eval mode: it adds the mean that it subtracts and multiplies by the deviation."""
    norm: Any = kind(channels)
    norm.running_mean.fill_(mean)
    norm.running_var.fill_(var)
    with torch.no_grad():
        norm.bias.fill_(mean)
        norm.weight.fill_((var + norm.eps) ** 0.5)
    return norm.eval()  # type: ignore[no-any-return]


def rewritten(bright: Any, *layers: nn.Module) -> Model:
    """The bright network with ``layers`` instead of its head."""
    network = nn.Sequential(*list(bright.model.network)[:-1], *layers)
    return Model(network.eval(), "bright", 3, (3, 8, 8))


def head(bright: Any) -> nn.Linear:
    found = bright.model.network[-1]
    assert isinstance(found, nn.Linear)
    return found


@pytest.mark.parametrize(("mean", "var"), [(0.0, 1.0), (0.7, 4.0)])
def test_idle_norms_are_removed_and_real_ones_kept(bright: Any, mean: float, var: float) -> None:
    model = rewritten(bright, idle_norm(nn.BatchNorm1d, 12, mean, var), head(bright))
    plain = plain_form(model, bright.data.images)
    kinds = [type(child) for child in plain.network.children()]
    assert kinds[-2:] == [nn.Identity, nn.Linear] and kinds.count(nn.BatchNorm2d) == 2
    torch.testing.assert_close(plain.module(bright.data.images), model.module(bright.data.images))
    assert isinstance(model.network[-2], nn.BatchNorm1d)  # type: ignore[index]


def test_norm_that_moves_one_channel_is_kept(bright: Any) -> None:
    norm = idle_norm(nn.BatchNorm1d, 12)
    with torch.no_grad():
        norm.get_parameter("bias")[3] = 0.1
    model = rewritten(bright, norm, head(bright))
    assert plain_form(model, bright.data.images) is model


def test_rows_of_linear_layers_become_one(bright: Any) -> None:
    old = head(bright)
    first, second, last = nn.Linear(12, 12), nn.Linear(12, 12, bias=False), nn.Linear(12, 3)
    with torch.no_grad():
        first.weight.copy_(torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))[0])
        second.weight.copy_(2 * torch.eye(12))
        last.weight.copy_(old.weight @ first.weight.T / 2)
        last.bias.copy_(old.bias - 2 * last.weight @ first.bias)
    plain = plain_form(rewritten(bright, first, second, last), bright.data.images)
    (only,) = (child for child in plain.network.children() if isinstance(child, nn.Linear))
    torch.testing.assert_close(only.weight, old.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(only.bias, old.bias, rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """Uses the output of its first linear layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 3), nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        z = self.first(images.flatten(1))
        return self.second(z) + z  # type: ignore[no-any-return]


def test_layers_that_cannot_be_joined_stay() -> None:
    model = Model(Twice().eval(), "twice", 3, (3, 4, 4))
    data = CleanData(torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3)
    assert plain_form(model, data.images) is model


def test_a_layer_that_runs_twice_in_a_row_stays() -> None:
    layer = nn.Linear(3, 3)
    model = Model(nn.Sequential(nn.Flatten(), nn.Linear(48, 3), nn.ReLU(), layer, layer).eval(), "shared", 3, (3, 4, 4))
    assert plain_form(model, torch.rand(9, 3, 4, 4)) is model


def test_a_plain_network_is_returned_unchanged(bright: Any) -> None:
    assert plain_form(bright.model, bright.data.images) is bright.model


def test_own_statistics_are_those_of_the_images() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Flatten(), nn.Linear(4 * 36, 2))
    model = Model(network.eval(), "own:x", 2, (3, 8, 8))
    images = torch.rand(300, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = with_own_statistics(model, images)
    norm = found.network[1]
    seen = network[0](images)
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)), rtol=2e-2, atol=1e-4)
    assert norm.momentum == 0.3 and not norm.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()), "the model is kept"
