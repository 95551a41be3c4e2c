"""Shuffled and augmented passes over clean data, for which no step waits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bdprune.data import CleanData
from bdprune.runtime.augment import crop_as_drawn, draw_crops

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
    """One pass: ``[4, N]``, positions of the images in their order and what :func:`draw_crops` gives for them."""
    order = torch.randperm(sum(sizes), generator=generator)
    return torch.cat([order[None], torch.cat([draw_crops(size, generator, padding) for size in sizes], 1)])


def _batches(images: Tensor, labels: Tensor, drawn: tuple[Tensor, ...], padding: int) -> Batches:
    for one in drawn:
        yield crop_as_drawn(images[one[0]], one[1:], padding), labels[one[0]]


def _on(value: Tensor, device: torch.device) -> Tensor:
    """``value`` on ``device``; a GPU reads it out of pinned memory, for which the host does not wait."""
    pinned = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
    return pinned.to(device, non_blocking=True)
