from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdprune.model.handle import Model
from bdprune.model.head import find_head, inputs_of
from bdprune.model.outputs import give_logits


def model_of(*layers: nn.Module, classes: int = 3) -> Model:
    return Model(nn.Sequential(*layers).eval(), "plain", classes, (3, 8, 8))


def test_the_head_gives_the_logits_of_its_features(bright: Any) -> None:
    model, images = bright.model, bright.data.images[:5]
    head = find_head(model)
    assert head is not None and head.path == "8"
    with torch.no_grad(), inputs_of(model.network, head.path) as seen:
        logits = model.module(images)
    torch.testing.assert_close(seen[0] @ head.weight.T + head.bias, logits)
    assert not model.network[8]._forward_pre_hooks


def test_a_head_without_bias_has_a_bias_of_zero() -> None:
    head = find_head(model_of(nn.Flatten(), nn.Linear(192, 3, bias=False)))
    assert head is not None and torch.equal(head.bias, torch.zeros(3))


def test_the_last_of_several_linear_layers_is_the_head() -> None:
    head = find_head(model_of(nn.Flatten(), nn.Linear(192, 3), nn.ReLU(), nn.Linear(3, 3)))
    assert head is not None and head.path == "3"


def test_a_network_with_one_logit_has_two_rows() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 1)).eval()
    give_logits(network, (3, 8, 8))
    head = find_head(Model(network, "one", 2, (3, 8, 8)))
    assert head is not None
    assert torch.equal(head.weight[0], torch.zeros(192)) and head.weight[1].abs().sum() > 0


class Doubled(nn.Module):
    """Doubles what its linear layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 3)

    def forward(self, images: Tensor) -> Tensor:
        return 2 * self.linear(images.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("network", [Doubled(), nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten())])
def test_a_network_whose_logits_come_from_another_layer_has_no_head(network: nn.Module) -> None:
    assert find_head(Model(network.eval(), "other", 3, (3, 8, 8))) is None
