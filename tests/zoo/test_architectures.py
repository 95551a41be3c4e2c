"""The architectures of RNP's Tables 2, 5 and 9 at a small width: they train, and their saved weights are recognised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from bdprune.model.architectures import build
from bdprune.model.loading import load
from bdprune.zoo.store import save_weights

# The architectures of the papers as CIFAR models, and as ImageNet models that also take small images.
NAMES = [
    "resnet18_cifar",
    "resnet34_cifar",
    "vgg16_bn_cifar",
    "vgg19_bn_cifar",
    "mobilenet_v2_cifar",
    "mobilenet_v2",
    "efficientnet_b0_cifar",
    "efficientnet_b0",
    "preact_resnet18",
]
UNUSED = ("layers.0.conv1.", "layers.0.bn1.")
"""Weights of EfficientNet in the CIFAR spelling that published checkpoints have but that no input reaches."""


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", NAMES)
def test_one_step_changes_every_weight_and_the_file_is_recognised(name: str, size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build(name, 12, width=8)
    images, labels = torch.rand(8, 3, size, size), torch.arange(8)
    loss = functional.cross_entropy(network(images), labels)
    loss.backward()
    for key, parameter in network.named_parameters():
        if name != "efficientnet_b0_cifar" or not key.startswith(UNUSED):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
            assert parameter.grad.any() or key.endswith("bias"), key  # a bias before a norm has no gradient
    torch.optim.SGD(network.parameters(), 1e-3).step()
    save_weights(network, tmp_path / "model.safetensors")
    model = load(tmp_path / "model.safetensors", input_shape=(3, size, size))
    assert (model.arch, model.num_classes, model.input_shape) == (name, 12, (3, size, size))
    network.load_state_dict({key: value.half().float() for key, value in network.state_dict().items()})
    assert torch.allclose(model.network(images), network.eval()(images), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_width_multiplies_the_channels(name: str) -> None:
    """Twice the width means four times the weights between the first and the last layer, up to rounding."""
    with torch.device("meta"):
        counts = [
            sum(parameter.numel() for parameter in build(name, 10, width=width).parameters() if parameter.ndim == 4)
            for width in (32, 64)
        ]
    assert 3 < counts[1] / counts[0] < 4.1
