import pytest
import torch
from torch import nn

from bdprune.attacks.features import head, penultimate
from bdprune.errors import ArchitectureError
from bdprune.model.architectures import build


@pytest.mark.parametrize("arch", ["resnet18_cifar", "vgg16_bn_cifar", "mobilenet_v2", "efficientnet_b0"])
def test_the_last_linear_layer_maps_features_to_logits(arch: str) -> None:
    network = build(arch, 5, width=8).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features = penultimate(network, images)
        assert features.ndim == 2
        assert torch.allclose(head(network)(features), network(images), atol=1e-6)


def test_features_are_differentiable_and_leave_no_hooks() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    images = torch.rand(3, 3, 2, 2, requires_grad=True)
    features = penultimate(network, images)
    (gradient,) = torch.autograd.grad(features.sum(), images)
    expected = (features > 0).float() @ network[1].weight
    assert torch.allclose(gradient.flatten(1), expected)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network[3]._forward_pre_hooks


def test_a_network_without_a_linear_layer_is_named() -> None:
    with pytest.raises(ArchitectureError, match="Sequential has no linear layer"):
        penultimate(nn.Sequential(nn.Conv2d(3, 2, 1)), torch.rand(1, 3, 4, 4))
