"""Small sets of images to attack."""

import torch

from bdprune.attacks.base import Setting


def setting(count: int = 40, channels: int = 3, size: int = 16, classes: int = 10, seed: int = 0) -> Setting:
    """Seeded noise without a pixel of 0 or 255, which then always differ from what they cover; labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(25, 230, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    return Setting(images, torch.arange(count) % classes, classes, seed)
