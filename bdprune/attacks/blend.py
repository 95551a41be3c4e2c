"""Blend (Chen et al., 2017): one fixed full-size pattern mixed into the image, dirty labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from bdprune.attacks.base import Attack, Shape
from bdprune.attacks.check import Share
from bdprune.attacks.patterns import noise, picture

_PATTERNS = {"noise": noise, "image": picture}


@dataclass(frozen=True)
class Blend(Attack):
    """``(1 - alpha) x + alpha p`` with one fixed pattern p. A mix of values in [0, 1] never needs clipping.

    Args:
        target: label that the trigger calls; None for all-to-all.
        rate: share of the training set that is poisoned (RNP, Table 6: 0.1).
        alpha: share of the pattern in the mix (RNP, Table 6: 0.2).
        pattern_seed: seed of the pattern.
        pattern: "noise", uniform and independent (RNP and ANP); or "image", a smooth picture in the place of the
            cartoon that other papers mix in.
    """

    alpha: Share = 0.2
    pattern_seed: int = 0
    pattern: Literal["noise", "image"] = "noise"

    kind: ClassVar[str] = "blend"

    def new_trigger(self, shape: Shape) -> nn.Module:
        return Mix(_PATTERNS[self.pattern](shape, self.pattern_seed), self.alpha)


class Mix(nn.Module):
    """Mixes a pattern ``[C, H, W]`` in [0, 1] into every image, ``alpha`` of it."""

    pattern: Tensor

    def __init__(self, pattern: Tensor, alpha: float) -> None:
        super().__init__()
        self.register_buffer("pattern", pattern)
        self.alpha = alpha

    def forward(self, images: Tensor) -> Tensor:
        return (1 - self.alpha) * images + self.alpha * self.pattern.to(images)
