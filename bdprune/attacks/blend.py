"""Blend (Chen et al., 2017): one fixed full-size pattern mixed into the image, dirty labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bdprune.attacks.base import Attack, Shape, TriggerType


@dataclass(frozen=True)
class Blend(Attack):
    """``(1 - alpha) x + alpha p`` with a seeded uniform-noise pattern p.

    Args:
        target: label that the trigger calls; None for all-to-all.
        rate: share of the training set that is poisoned (RNP, Table 6: 0.1).
        alpha: share of the pattern in the mix (RNP, Table 6: 0.2).
        pattern_seed: seed of the pattern.
    """

    alpha: float = 0.2
    pattern_seed: int = 0

    kind: ClassVar[str] = "blend"
    trigger_type: ClassVar[TriggerType] = "static"

    def new_trigger(self, shape: Shape) -> nn.Module:
        generator = torch.Generator().manual_seed(self.pattern_seed)
        return Mix(torch.rand(shape, generator=generator), self.alpha)


class Mix(nn.Module):
    """Mixes a pattern ``[C, H, W]`` in [0, 1] into every image, ``alpha`` of it."""

    pattern: Tensor

    def __init__(self, pattern: Tensor, alpha: float) -> None:
        super().__init__()
        self.register_buffer("pattern", pattern)
        self.alpha = alpha

    def forward(self, images: Tensor) -> Tensor:
        return (1 - self.alpha) * images + self.alpha * self.pattern.to(images)
