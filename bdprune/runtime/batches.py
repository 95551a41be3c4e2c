"""Shuffled and augmented passes over clean data, for which no step waits, and the augmentation alone."""

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
    """``count`` passes over ``data``, each of batches (images ``[B, C, H, W]``, labels ``[B]``) on ``device``.

    Batches are of nearly equal size, at most ``batch_size``: statistics of a last batch with a handful of images
    would mean nothing, neither to a batch norm nor to a stop accuracy.

    What is random is drawn on the CPU, for all passes before the first: images and draws then go to ``device`` in a
    copy each, where a copy for every batch, or for every pass, could wait for the steps before it.
    """
    sizes = [len(part) for part in torch.arange(len(data)).tensor_split(-(-len(data) // batch_size))]
    drawn = [_draw(sizes, padding, generator) for _ in range(count)]
    images, labels = _on(data.images, device), _on(data.labels, device)
    for one in _on(torch.stack(drawn), device) if drawn else ():
        yield _batches(images, labels, one.split(sizes, 1), padding)


def _draw(sizes: list[int], padding: int, generator: torch.Generator) -> Tensor:
    """One pass: ``[4, N]``, positions of the images in their order and what :func:`_draw_crops` gives for them."""
    order = torch.randperm(sum(sizes), generator=generator)
    return torch.cat([order[None], torch.cat([_draw_crops(size, generator, padding) for size in sizes], 1)])


def _batches(images: Tensor, labels: Tensor, drawn: tuple[Tensor, ...], padding: int) -> Batches:
    for one in drawn:
        yield _cropped(images[one[0]], one[1:], padding), labels[one[0]]


def _on(value: Tensor, device: torch.device) -> Tensor:
    """``value`` on ``device``; a GPU reads it out of pinned memory, for which the host does not wait."""
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
    """What is random in the crops of ``count`` images.

    Returns:
        ``[3, count]`` int64, on the CPU: rows and columns from the padded image's corner, in [0, 2 * padding], and 1
        for an image that is mirrored, else 0.
    """
    top, left = (torch.randint(2 * padding + 1, (count,), generator=generator) for _ in range(2))
    mirrored = torch.rand(count, generator=generator) < 0.5 if flip else torch.zeros(count)
    return torch.stack([top, left, mirrored.long()])


def _cropped(images: Tensor, drawn: Tensor, padding: int) -> Tensor:
    """The crops of ``images`` that :func:`_draw_crops` has drawn; both are on the same device."""
    count, _, height, width = images.shape
    top, left, mirrored = drawn.unsqueeze(2)
    across = torch.arange(width, device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.where(mirrored.bool(), width - 1 - across, across)
    # One gather does crop and flip together; indexing pixels like this leaves the channels innermost.
    padded = functional.pad(images, (padding, padding, padding, padding)).permute(0, 2, 3, 1)
    sample = torch.arange(count, device=images.device).view(-1, 1, 1)
    picked = padded[sample, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)
