"""What data-poisoning attacks share: drawing the images to poison."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_victims(labels: Tensor, target: int, rate: float, generator: torch.Generator) -> Tensor:
    """Indices of ``round(rate * N)`` images outside the target class, without replacement.

    Args:
        labels: ``[N]`` int64.
        target: label that the trigger calls; images of it are never drawn.
        rate: share of all N images to poison, in [0, 1].
        generator: source of randomness.

    Raises:
        ValueError: there are fewer non-target images than asked for.
    """
    count = round(rate * len(labels))
    candidates = (labels != target).nonzero().flatten()
    if count > len(candidates):
        raise ValueError(f"cannot poison {count} of {len(candidates)} images outside class {target}")
    return candidates[torch.randperm(len(candidates), generator=generator)[:count]]
