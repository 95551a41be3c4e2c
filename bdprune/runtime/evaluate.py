"""Predictions, clean accuracy, attack success rate and robust accuracy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

BATCH = 500  # images in one forward pass

_ROUNDING = 1e-6  # of a difference of two shares in float32


@torch.no_grad()
def predict(module: nn.Module, images: Tensor, batch_size: int = BATCH) -> Tensor:
    """Predicted label of every image.

    Args:
        module: images in [0, 1] -> logits ``[N, K]``; used in its current mode.
        images: ``[N, C, H, W]`` in [0, 1].

    Returns:
        ``[N]`` int64 on the CPU.
    """
    device = next(module.parameters()).device
    batches = [module(batch.to(device)).argmax(1).cpu() for batch in images.split(batch_size)]
    return torch.cat(batches) if batches else torch.empty(0, dtype=torch.int64)


def clean_accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images ``[N, C, H, W]`` predicted as their label, in [0, 1]; includes all classes."""
    return share_right(predict(module, images), labels)


def share_right(predicted: Tensor, labels: Tensor) -> float:
    """Share of right predictions ``[N]``, in [0, 1]."""
    return (predicted == labels).float().mean().item()


def within(drop: float, limit: float) -> bool:
    """Whether a fall of accuracy is at most ``limit``; rounding does not count, though 0.9 - 0.88 > 0.02."""
    return drop <= limit + _ROUNDING


def attack_success_rate(
    module: nn.Module, images: Tensor, labels: Tensor, trigger: Callable[[Tensor], Tensor], goal: Tensor
) -> float:
    """Share of triggered images predicted as their goal, in [0, 1].

    Args:
        module: images in [0, 1] -> logits.
        images: ``[N, C, H, W]`` in [0, 1], without the trigger.
        labels: ``[N]`` true labels.
        trigger: images in [0, 1] -> triggered images.
        goal: ``[N]`` labels that the attacker wants. Images whose true label is the goal are excluded.
    """
    count = goal != labels
    return (_predict_triggered(module, images[count], trigger) == goal[count]).float().mean().item()


def robust_accuracy(
    module: nn.Module, images: Tensor, labels: Tensor, trigger: Callable[[Tensor], Tensor], goal: Tensor
) -> float:
    """Share of the triggered images of :func:`attack_success_rate` predicted as their true label, in [0, 1]."""
    count = goal != labels
    return (_predict_triggered(module, images[count], trigger) == labels[count]).float().mean().item()


@torch.no_grad()
def _predict_triggered(module: nn.Module, images: Tensor, trigger: Callable[[Tensor], Tensor]) -> Tensor:
    parts = [predict(module, trigger(batch).clamp(0, 1)) for batch in images.split(500)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
