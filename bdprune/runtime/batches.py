"""Shuffled and augmented passes over clean data that never block a step, and the augmentation itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from bdprune.data import CleanData

Batches = Iterator[tuple[Tensor, Tensor]]


def passes(
    data: CleanData, count: int, batch_size: int, padding: int, generator: torch.Generator, device: torch.device
) -> Iterator[Batches]:
    """``count`` passes over ``data``, each as batches (images ``[B, C, H, W]``, labels ``[B]``) on ``device``.

    The images are cropped at random, and half of them are mirrored if ``data.mirror`` is set.

    Batches have nearly equal size, at most ``batch_size``: the statistics of a small last batch would be meaningless
    for batch norms and for a stop accuracy.

    All random numbers are drawn on the CPU before the first pass. Images and random numbers are then copied to
    ``device`` once each: a copy for every batch or every pass could wait for earlier steps.
    """
    sizes = [len(part) for part in torch.arange(len(data)).tensor_split(-(-len(data) // batch_size))]
    drawn = [_draw(sizes, padding, generator, data.mirror) for _ in range(count)]
    images, labels = _on(data.images, device), _on(data.labels, device)
    for one in _on(torch.stack(drawn), device) if drawn else ():
        yield _batches(images, labels, one.split(sizes, 1), padding)


def _draw(sizes: list[int], padding: int, generator: torch.Generator, flip: bool) -> Tensor:
    """One pass: ``[4, N]``, the order of the images and the result of :func:`_draw_crops` for them."""
    order = torch.randperm(sum(sizes), generator=generator)
    return torch.cat([order[None], torch.cat([_draw_crops(size, generator, padding, flip) for size in sizes], 1)])


def _batches(images: Tensor, labels: Tensor, drawn: tuple[Tensor, ...], padding: int) -> Batches:
    for one in drawn:
        yield _cropped(images[one[0]], one[1:], padding), labels[one[0]]


def _on(value: Tensor, device: torch.device) -> Tensor:
    """``value`` on ``device``; a GPU copies it from pinned memory, so that the host does not wait."""
    pinned = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
    return pinned.to(device, non_blocking=True)


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = 4, flip: bool = True) -> Tensor:
    """Random crops of the zero-padded images, half of them mirrored unless ``flip`` is False.

    Args:
        images: ``[N, C, H, W]``, any dtype.
        generator: source of randomness (CPU).
        padding: pixels added on each side before cropping back to H x W.

    Returns:
        ``[N, C, H, W]`` in channels_last memory, same dtype.
    """
    drawn = _draw_crops(len(images), generator, padding, flip)
    return _cropped(images, drawn.to(images.device, non_blocking=True), padding)


def _draw_crops(count: int, generator: torch.Generator, padding: int = 4, flip: bool = True) -> Tensor:
    """Random numbers for the crops of ``count`` images.

    Returns:
        ``[3, count]`` int64, on the CPU: row and column offsets in the padded image, in [0, 2 * padding], and 1 for a
        mirrored image, otherwise 0.
    """
    top, left = (torch.randint(2 * padding + 1, (count,), generator=generator) for _ in range(2))
    mirrored = torch.rand(count, generator=generator) < 0.5 if flip else torch.zeros(count)
    return torch.stack([top, left, mirrored.long()])


def _cropped(images: Tensor, drawn: Tensor, padding: int) -> Tensor:
    """The crops of ``images`` drawn by :func:`_draw_crops`; both are on the same device."""
    count, _, height, width = images.shape
    top, left, mirrored = drawn.unsqueeze(2)
    across = torch.arange(width, device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.where(mirrored.bool(), width - 1 - across, across)
    # One gather does both crop and flip, and keeps the channels innermost in memory.
    padded = functional.pad(images, (padding, padding, padding, padding)).permute(0, 2, 3, 1)
    sample = torch.arange(count, device=images.device).view(-1, 1, 1)
    picked = padded[sample, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)
