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
    count, _, height, width = images.shape
    top = torch.randint(2 * padding + 1, (count, 1), generator=generator)
    left = torch.randint(2 * padding + 1, (count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5 if flip else torch.zeros(count, 1, dtype=torch.bool)
    # What was drawn goes to the images: copies this small do not wait for the device.
    top, left, mirrored = (drawn.to(images.device, non_blocking=True) for drawn in (top, left, mirrored))
    across = torch.arange(width, device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.where(mirrored, width - 1 - across, across)
    # One gather does crop and flip together; indexing pixels this way leaves the channels innermost.
    padded = functional.pad(images, (padding, padding, padding, padding)).permute(0, 2, 3, 1)
    sample = torch.arange(count, device=images.device).view(-1, 1, 1)
    picked = padded[sample, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)
