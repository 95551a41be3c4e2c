"""Networks and images for the benchmarks of methods. Their weights are random: training does not change the speed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bdprune.data import CleanData
from bdprune.model import Model, ResNet18Cifar

CLASSES, SIZE = 10, 32


def resnet18(width: int, device: torch.device, seed: int = 0) -> Model:
    """A ResNet-18 for 32x32 images with random weights and random, non-degenerate batch norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ResNet18Cifar(CLASSES, width=width)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.1, generator=generator)
    module = network.train()
    with torch.no_grad():
        module(clean_images(16, torch.device("cpu"), seed).images)  # running statistics from real feature maps
    return Model(network.eval().to(device), "resnet18_cifar", CLASSES, (3, SIZE, SIZE))


def clean_images(count: int, device: torch.device, seed: int = 0) -> CleanData:
    """Noise in [0, 1] as float32 ``[count, 3, 32, 32]``, with labels 0 to 9 in turn, on the CPU like real data."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, SIZE, SIZE, generator=generator)
    # The methods move batches to the device themselves, so the plain loops must do the same.
    return CleanData(images, torch.arange(count) % CLASSES)


def conv_flops(network: nn.Module, size: int = SIZE) -> float:
    """FLOPs of all convolutions in one forward pass of one image; a multiply-add counts as two."""
    total = [0.0]

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        total[0] += 2.0 * module.weight.numel() * output[0, 0].numel()

    hooks = [module.register_forward_hook(count) for module in network.modules() if isinstance(module, nn.Conv2d)]
    device = next(network.parameters()).device
    with torch.no_grad():
        network(torch.zeros(1, 3, size, size, device=device))
    for hook in hooks:
        hook.remove()
    return total[0]


def weight_bytes(network: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(parameter.nbytes for parameter in network.parameters())


def replace_modules(network: nn.Module, kind: type[nn.Module], make: Callable[[nn.Module], nn.Module]) -> None:
    """Replaces every child of exactly this type by ``make(child)``, at any depth."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind:
                setattr(parent, name, make(child))
