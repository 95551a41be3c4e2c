import pytest
import torch
from torch import nn

from bdprune.loops.activation import ActivationSettings, on_simplex, raise_features
from bdprune.model import Model
from bdprune.runtime import FrozenNetworks


def test_the_nearest_point_of_the_simplex() -> None:
    points = on_simplex(torch.tensor([[0.2, 0.3, 0.5], [2.0, 0.0, 0.0], [0.6, 0.6, -1.0]]))
    torch.testing.assert_close(points, torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]))


def corner(strength: float) -> Model:
    """Only label 2 reads its third feature, which grows with the top left pixel and falls with the next."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 4))
    with torch.no_grad():
        network[1].weight.zero_()
        network[1].bias.zero_()
        network[1].weight[:2] = torch.full((2, 16), 1 / 16)
        network[1].weight[2, :2] = torch.tensor([strength, -strength])
        network[1].bias[2] = strength
        network[3].weight.zero_()
        network[3].weight[:3] = torch.eye(3)
        network[3].bias.zero_()
    return Model(network.eval(), "corner", 4, (1, 4, 4))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("alone", [0, 20])
def test_the_strongest_feature_raises_its_label(shared: bool, alone: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 1, 4, 4, generator=generator)
    settings = ActivationSettings(alone_steps=alone, steps=40, shared=shared, restarts=2)
    networks = FrozenNetworks([corner(20.0)], images)
    rises = raise_features(networks, "3", images, settings, generator)
    assert rises.shape == (2, 4)
    assert rises.argmax(1).tolist() == [2, 2]
    before = 20 * (images[:, 0, 0, 0] - images[:, 0, 0, 1]).view(2, 3).mean(1)
    # The best trigger is a white pixel and a black one, fully opaque.
    torch.testing.assert_close(rises[:, 2], 20 - before, rtol=0.05, atol=0.1)
