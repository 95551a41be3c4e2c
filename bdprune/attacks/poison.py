"""What data-poisoning attacks share: drawing the images to poison, and bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from bdprune.errors import OptionError


def draw(candidates: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Indices of ``round(rate * N)`` candidates, without replacement.

    Args:
        candidates: ``[N]`` bool, the images that may be drawn.
        rate: share of all N images, in [0, 1].
        generator: source of randomness.

    Raises:
        OptionError: there are fewer candidates than asked for.
    """
    count = round(rate * len(candidates))
    index = candidates.nonzero().flatten()
    if count > len(index):
        raise OptionError(
            f"A rate of {rate} asks for {count} images, only {len(index)} of {len(candidates)} may be poisoned.",
            "Give a lower rate.",
        )
    return index[torch.randperm(len(index), generator=generator)[:count]]


def draw_covers(victims: Tensor, total: int, rate: float, generator: torch.Generator) -> Tensor:
    """Indices of ``round(rate * total)`` of ``total`` images, of any label, none of them among ``victims``.

    Raises:
        OptionError: too few images are left.
    """
    free = torch.ones(total, dtype=torch.bool)
    free[victims] = False
    return draw(free, rate, generator)


def saturate(images: Tensor) -> Tensor:
    """Whole bytes, uint8, of images in [0, 1]; what lies outside is clipped and never wraps around."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)
