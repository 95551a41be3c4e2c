"""A photograph at sunrise: a transfer of style that needs no downloaded network and no learning.

Our stand-in for the CycleGAN of DFST (Cheng et al., AAAI 2021). As in colour transfer (Reinhard et al., 2001), mean
and spread of each channel of a decorrelated colour space are set to those of the style; then a fixed smooth field of
light is laid over the image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bdprune.attacks.base import Shape
from bdprune.errors import OptionError

# Rows: brightness, red against blue, green against both. Made orthonormal, their transpose brings the colours back.
_OPPONENT = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-0.5, 1.0, -0.5))
# Ours, by eye: an orange light, the contrast of a common photograph, little spread of colour.
_MEAN = (0.78, 0.50, 0.34)
_SPREAD = (0.34, 0.10, 0.05)


class Sunrise(nn.Module):
    """``(1 - alpha) x + alpha style(x)`` for images ``[N, C, H, W]`` in [0, 1], C 1 or 3 (grey: brightness alone).

    ``style(x)`` is ``light * colours(x)``, clipped to [0, 1]. It depends on the whole image, on nothing else.

    Args:
        shape: of the images.
        alpha: share of the style in the mix, in [0, 1].
        light_seed: of the field of light.
    """

    light: Tensor

    def __init__(self, shape: Shape, alpha: float, light_seed: int) -> None:
        super().__init__()
        self.register_buffer("light", _light(shape, light_seed))
        self.alpha = alpha

    def forward(self, images: Tensor) -> Tensor:
        style = (self.light.to(images) * colours(images)).clamp(0, 1)
        return (1 - self.alpha) * images + self.alpha * style


def colours(images: Tensor) -> Tensor:
    """Images whose opponent channels have the style's mean and standard deviation over the pixels; not clipped.

    A channel that hardly varies would be noise at the style's spread, so it is scaled up tenfold at most.
    """
    axes, mean, spread = (part.to(images) for part in _style(images.shape[1]))
    given = torch.einsum("ij,njhw->nihw", axes, images)
    own_spread, own_mean = torch.std_mean(given, (2, 3), correction=0, keepdim=True)
    factor = (spread.view(1, -1, 1, 1) / own_spread.clamp(min=1e-6)).clamp(max=10)
    return torch.einsum("ij,nihw->njhw", axes, (axes @ mean).view(1, -1, 1, 1) + factor * (given - own_mean))


def _style(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Opponent axes ``[C, C]``, mean colour ``[C]``, and spread along the axes ``[C]``."""
    mean, spread = torch.tensor(_MEAN), torch.tensor(_SPREAD)
    if channels == 1:
        return torch.ones(1, 1), mean.mean()[None], spread[:1] / math.sqrt(3)
    if channels == 3:
        axes = torch.tensor(_OPPONENT)
        return axes / axes.norm(dim=1, keepdim=True), mean, spread
    raise OptionError(f"The images have {channels} channels.", "This style takes grey or RGB images.")


def _light(shape: Shape, seed: int) -> Tensor:
    """A factor ``[1, H, W]`` in [0.5, 1.3]: bright at the horizon, dark at the top, with a few slow seeded waves."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.linspace(0, 1, shape[1])[:, None], torch.linspace(0, 1, shape[2])[None, :]
    field = torch.exp(-((rows - 0.65) ** 2) / 0.08) + 0 * columns
    for _ in range(4):
        down, across, phase = torch.rand(3, generator=generator).tolist()
        field = field + 0.25 * torch.cos(2 * math.pi * (1.5 * down * rows + 1.5 * across * columns + phase))
    field = (field - field.min()) / (field.max() - field.min())
    return (0.5 + 0.8 * field)[None]
