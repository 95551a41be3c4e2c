"""Predictions, clean accuracy, attack success rate and robust accuracy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def predict(module: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """Predicted label of every image.

    Args:
        module: images in [0, 1] -> logits ``[N, K]``; used in the mode it is in.
        images: ``[N, C, H, W]`` in [0, 1].

    Returns:
        ``[N]`` int64 on the CPU.
    """
    device = next(module.parameters()).device
    batches = [module(batch.to(device)).argmax(1).cpu() for batch in images.split(batch_size)]
    return torch.cat(batches) if batches else torch.empty(0, dtype=torch.int64)


def clean_accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images ``[N, C, H, W]`` predicted as their label, in [0, 1]; all classes count."""
    return (predict(module, images) == labels).float().mean().item()


def attack_success_rate(
    module: nn.Module, images: Tensor, labels: Tensor, apply: Callable[[Tensor], Tensor], target: int
) -> float:
    """Share of triggered images predicted as ``target``, in [0, 1]; images of the target class never count."""
    victims = images[labels != target]
    return (predict(module, apply(victims)) == target).float().mean().item()


def robust_accuracy(
    module: nn.Module, images: Tensor, labels: Tensor, apply: Callable[[Tensor], Tensor], target: int
) -> float:
    """Share of triggered non-target images predicted as their true label, in [0, 1]."""
    keep = labels != target
    return (predict(module, apply(images[keep])) == labels[keep]).float().mean().item()
