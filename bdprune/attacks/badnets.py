"""BadNets (Gu et al., 2017): a small patch in a corner, dirty labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from bdprune.attacks.base import Attack, Shape, TriggerType
from bdprune.attacks.check import check_at_least, check_room
from bdprune.attacks.patterns import checkerboard


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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("size", self.size, 1)
        check_at_least("margin", self.margin, 0)

    def new_trigger(self, shape: Shape) -> nn.Module:
        check_room(self.size + self.margin, shape)
        return Patch(checkerboard(self.size).expand(shape[0], -1, -1), self.margin)


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
