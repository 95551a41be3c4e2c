"""Crop-and-flip augmentation of a whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = 4, flip: bool = True) -> Tensor:
    """Random crops of the zero-padded images, half of them mirrored unless ``flip`` is False.

    Args:
        images: ``[N, C, H, W]``, any dtype.
        generator: source of randomness (CPU).
        padding: pixels added on each side before cropping back to H x W.

    Returns:
        ``[N, C, H, W]`` in channels_last memory, same dtype.
    """
    drawn = draw_crops(len(images), generator, padding, flip)
    return crop_as_drawn(images, drawn.to(images.device, non_blocking=True), padding)


def draw_crops(count: int, generator: torch.Generator, padding: int = 4, flip: bool = True) -> Tensor:
    """What is random in the crops of ``count`` images.

    Returns:
        ``[3, count]`` int64, on the CPU: rows and columns from the padded image's corner, in [0, 2 * padding], and 1
        for an image that is mirrored, else 0.
    """
    top, left = (torch.randint(2 * padding + 1, (count,), generator=generator) for _ in range(2))
    mirrored = torch.rand(count, generator=generator) < 0.5 if flip else torch.zeros(count)
    return torch.stack([top, left, mirrored.long()])


def crop_as_drawn(images: Tensor, drawn: Tensor, padding: int) -> Tensor:
    """The crops of ``images`` that :func:`draw_crops` has drawn; both are on the same device."""
    count, _, height, width = images.shape
    top, left, mirrored = drawn.unsqueeze(2)
    across = torch.arange(width, device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.where(mirrored.bool(), width - 1 - across, across)
    # One gather does crop and flip together; indexing pixels this way leaves the channels innermost.
    padded = functional.pad(images, (padding, padding, padding, padding)).permute(0, 2, 3, 1)
    sample = torch.arange(count, device=images.device).view(-1, 1, 1)
    picked = padded[sample, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)
