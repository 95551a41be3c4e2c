"""Patterns of triggers, all generated here, and modules that apply them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.attacks.base import Shape
from bdprune.attacks.check import check_fits


def checkerboard(size: int) -> Tensor:
    """Black and white in turn, ``[size, size]``; the first pixel is white."""
    index = torch.arange(size)
    return ((index[:, None] + index[None, :]) % 2 == 0).float()


def noise(shape: Shape, seed: int) -> Tensor:
    """Independent uniform values in [0, 1], ``[C, H, W]``."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def picture(shape: Shape, seed: int) -> Tensor:
    """A smooth coloured picture like an out-of-focus landscape, ``[C, H, W]``, scaled to the full range [0, 1].

    It sums four octaves of bicubic noise, each twice as fine and half as strong as the one before, similar to the
    spectrum of photographs. The lightness, which all channels share, has twice the weight of the colours.
    """
    channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    layers = torch.zeros(channels + 1, height, width)
    for octave in range(4):
        cells = 2 ** (octave + 1)
        grid = torch.rand(1, channels + 1, cells, cells, generator=generator)
        layers += functional.interpolate(grid, (height, width), mode="bicubic", align_corners=True)[0] / 2**octave
    mixed = layers[:1] + layers[1:] / 2
    return (mixed - mixed.min()) / (mixed.max() - mixed.min())


def in_corner(patch: Tensor, margin: int, shape: Shape) -> Tensor:
    """``patch`` ``[C, h, w]`` on a black image of ``shape``, ``margin`` pixels from the bottom right corner.

    Raises:
        OptionError: the patch and its margin are larger than the image.
    """
    channels, height, width = patch.shape
    check_fits(max(height, width) + margin, shape)
    out = torch.zeros(channels, *shape[1:])
    bottom, right = shape[1] - margin, shape[2] - margin
    out[:, bottom - height : bottom, right - width : right] = patch
    return out


class Added(nn.Module):
    """Adds a pattern to every image ``[C, H, W]`` and clips to [0, 1].

    Args:
        name: of the pattern in the state dict.
        pattern: of any shape that adds to the image's.
    """

    def __init__(self, name: str, pattern: Tensor) -> None:
        super().__init__()
        self.register_buffer(name, pattern)
        self._name = name

    def forward(self, images: Tensor) -> Tensor:
        return (images + self.get_buffer(self._name).to(images)).clamp(0, 1)


class Stamp(nn.Module):
    """Replaces the pixels under a mask by those of a pattern.

    Args:
        mask: ``[1, H, W]``, 1 where the pattern lies and 0 elsewhere.
        pattern: ``[C, H, W]`` in [0, 1].
    """

    mask: Tensor
    pattern: Tensor

    def __init__(self, mask: Tensor, pattern: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.register_buffer("pattern", pattern)

    def forward(self, images: Tensor) -> Tensor:
        mask, pattern = self.mask.to(images), self.pattern.to(images)
        return (1 - mask) * images + mask * pattern
