"""Blend (Chen et al., 2017): one fixed full-size pattern mixed into the image, dirty labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdprune.attacks.poison import draw_victims


@dataclass(frozen=True)
class Blend:
    """``(1 - alpha) x + alpha p`` with a seeded uniform-noise pattern p; static trigger.

    Args:
        target: label that the trigger calls.
        rate: share of the training set that is poisoned (RNP, Table 6: 0.1).
        alpha: share of the pattern in the mix (RNP, Table 6: 0.2).
        pattern_seed: seed of the pattern.
    """

    target: int
    rate: float = 0.1
    alpha: float = 0.2
    pattern_seed: int = 0

    def apply(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` in [0, 1] with the pattern mixed in; the input is left alone."""
        generator = torch.Generator().manual_seed(self.pattern_seed)
        pattern = torch.rand(images.shape[1:], generator=generator).to(images)
        return (1 - self.alpha) * images + self.alpha * pattern

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Copies of images ``[N, C, H, W]`` in [0, 1] and labels ``[N]`` with a share triggered and relabelled."""
        victims = draw_victims(labels, self.target, self.rate, generator)
        images, labels = images.clone(), labels.clone()
        images[victims] = self.apply(images[victims])
        labels[victims] = self.target
        return images, labels
