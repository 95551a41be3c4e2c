"""BadNets (Gu et al., 2017): a small patch in a corner, dirty labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bdprune.attacks.base import AttackSetting, Poisoned, Shape, unpoisoned
from bdprune.attacks.check import Count, Whole, check_fits
from bdprune.attacks.class_specific import ClassSpecific
from bdprune.attacks.patterns import checkerboard


@dataclass(frozen=True)
class BadNets(ClassSpecific):
    """A black-and-white checkerboard in the bottom right corner; a white pixel if ``size`` is 1.

    Args:
        target: target label; None for all-to-all.
        rate: share of the training set to poison (RNP, Table 6: 0.1).
        sources: labels that the trigger works on; empty for all.
        cover_ratio: see ``ClassSpecific``.
        size: edge of the square patch in pixels.
        margin: free pixels between the patch and the image border.
    """

    size: Count = 3
    margin: Whole = 1

    kind: ClassVar[str] = "badnets"

    def new_trigger(self, shape: Shape) -> nn.Module:
        check_fits(self.size + self.margin, shape)
        return Patch(checkerboard(self.size).expand(shape[0], -1, -1), self.margin)


@dataclass(frozen=True)
class PatchedNetwork(BadNets):
    """BadNets' patch as the trigger of an attack that changes the weights of a trained network."""

    trains: ClassVar[bool] = False
    class_specific: ClassVar[bool] = False

    def poison(self, setting: AttackSetting, trigger: nn.Module, generator: torch.Generator) -> Poisoned:
        """The clean set; this attack trains nothing on it."""
        return unpoisoned(setting)

    def start(self, network: nn.Module, setting: AttackSetting) -> None:
        """Takes the weights of the source."""
        assert setting.source is not None
        network.load_state_dict(setting.source.state_dict())


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
