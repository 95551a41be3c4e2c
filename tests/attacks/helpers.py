"""Small sets of images to attack."""

import torch
from torch import Tensor, nn

from bdprune.attacks.base import AttackSetting


def setting(count: int = 40, channels: int = 3, size: int = 16, classes: int = 10, seed: int = 0) -> AttackSetting:
    """Seeded noise without pixels of 0 or 255, so that such pixels of a trigger always change it; labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(25, 230, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    return AttackSetting(images, torch.arange(count) % classes, classes, seed)


def source(channels: int = 3, classes: int = 10) -> nn.Module:
    """A seeded, untrained network of the smallest kind that has features, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convs = [nn.Conv2d(channels, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU()]
        return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, classes)).eval()


def frozen(network: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers, to compare with later."""
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_untouched(network: nn.Module, before: dict[str, Tensor]) -> None:
    """Neither weights nor statistics nor gradients nor hooks of ``network`` changed."""
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())
