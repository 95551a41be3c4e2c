"""BadNets (Gu et al., 2017): a small patch in a corner, dirty labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bdprune.attacks.base import Attack, Shape, TriggerType


@dataclass(frozen=True)
class BadNets(Attack):
    """A black-and-white checkerboard in the bottom right corner.

    Args:
        target: label that the trigger calls; None for all-to-all.
        rate: share of the training set that is poisoned (RNP, Table 6: 0.1).
        size: edge of the square patch in pixels.
        margin: pixels left free between the patch and the image border.
    """

    size: int = 3
    margin: int = 1

    kind: ClassVar[str] = "badnets"
    trigger_type: ClassVar[TriggerType] = "static"

    def new_trigger(self, shape: Shape) -> nn.Module:
        index = torch.arange(self.size)
        checkerboard = ((index[:, None] + index[None, :]) % 2 == 0).float()  # white corners
        return Patch(checkerboard.expand(shape[0], -1, -1), self.margin)


class Patch(nn.Module):
    """Puts a patch ``[C, h, w]`` in [0, 1] into the bottom right corner, ``margin`` pixels from both borders."""

    patch: Tensor

    def __init__(self, patch: Tensor, margin: int) -> None:
        super().__init__()
        self.register_buffer("patch", patch.clone())
        self.margin = margin

    def forward(self, images: Tensor) -> Tensor:
        bottom, right = images.shape[-2] - self.margin, images.shape[-1] - self.margin
        height, width = self.patch.shape[-2:]
        out = images.clone()
        out[..., bottom - height : bottom, right - width : right] = self.patch.to(images)
        return out
