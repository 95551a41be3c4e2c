"""BadNets (Gu et al., 2017): a small patch in a corner, dirty labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdprune.attacks.poison import draw_victims


@dataclass(frozen=True)
class BadNets:
    """A black-and-white checkerboard in the bottom right corner; static trigger.

    Args:
        target: label that the trigger calls.
        rate: share of the training set that is poisoned (RNP, Table 6: 0.1).
        size: edge of the square patch in pixels.
        margin: pixels left free between the patch and the image border.
    """

    target: int
    rate: float = 0.1
    size: int = 3
    margin: int = 1

    def apply(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` in [0, 1] with the patch in place; the input is left alone."""
        height, width = images.shape[-2:]
        bottom, right = height - self.margin, width - self.margin
        out = images.clone()
        out[..., bottom - self.size : bottom, right - self.size : right] = self._patch().to(images)
        return out

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Copies of images ``[N, C, H, W]`` in [0, 1] and labels ``[N]`` with a share triggered and relabelled."""
        victims = draw_victims(labels, self.target, self.rate, generator)
        images, labels = images.clone(), labels.clone()
        images[victims] = self.apply(images[victims])
        labels[victims] = self.target
        return images, labels

    def _patch(self) -> Tensor:
        """White corners, alternating: ``[size, size]``."""
        index = torch.arange(self.size)
        return ((index[:, None] + index[None, :]) % 2 == 0).float()
