"""Blend (Chen et al., 2017): one fixed full-size pattern mixed into the image, dirty labels.

And A-Blend, adaptive blend (Qi et al., 2023): training images carry pieces of the pattern; some keep their label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from bdprune.attacks.base import AttackSetting, Poisoned, Shape, apply_trigger, draw, draw_covers, saturate
from bdprune.attacks.check import Count, Share
from bdprune.attacks.class_specific import ClassSpecific
from bdprune.attacks.patterns import noise, picture
from bdprune.errors import OptionError

_PATTERNS = {"noise": noise, "image": picture}


@dataclass(frozen=True)
class Blend(ClassSpecific):
    """``(1 - alpha) x + alpha p`` with one fixed pattern p. A mix of values in [0, 1] never needs clipping.

    Args:
        target: target label; None for all-to-all.
        rate: share of the training set to poison (RNP, Table 6: 0.1).
        sources: labels that the trigger works on; empty for all.
        cover_ratio: see ``ClassSpecific``.
        alpha: share of the pattern in the mix (RNP, Table 6: 0.2).
        pattern_seed: seed of the pattern.
        pattern: "noise", uniform and independent (RNP and ANP); or "image", a smooth picture instead of the cartoon
            that other papers use.
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


@dataclass(frozen=True)
class ABlend(Blend):
    """Blend whose pattern is cut into ``grid`` x ``grid`` pieces.

    Every poisoned and every cover image carries its own ``kept`` pieces, drawn at random. Covers keep their label, so
    that pieces alone do not mark triggered images; at test time the trigger is the whole pattern.

    Args:
        target: target label; None for all-to-all.
        rate: share of the training set to poison (RNP, Table 6: 0.1).
        alpha: share of the pattern in the mix (0.2).
        pattern_seed: seed of the pattern.
        pattern: see ``Blend``. (A ResNet-18 of width 32 did not learn pieces of the smooth picture in 24 epochs; one of
            width 8 learned pieces of noise in 8.)
        cover_rate: share of cover images in the training set (the paper: as many as poisoned images).
        grid: pieces along each axis (the paper: 4, which makes 16 pieces).
        kept: pieces in each poisoned or cover image (the paper: 8).
    """

    cover_rate: Share = 0.1
    grid: Count = 4
    kept: int = 8

    kind: ClassVar[str] = "ablend"
    class_specific: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.kept <= self.grid**2:
            raise OptionError(f"The setting kept is {self.kept}.", f"Give from 0 to all {self.grid**2} pieces.")

    def poison(self, setting: AttackSetting, trigger: nn.Module, generator: torch.Generator) -> Poisoned:
        """Dirty labels for ``rate`` of the images, and covers among the others."""
        wanted = self.goal(setting.labels, setting.num_classes)
        victims = draw(wanted != setting.labels, self.rate, generator)
        images, labels = setting.images.clone(), setting.labels.clone()
        labels[victims] = wanted[victims]
        chosen = draw_covers(victims, len(labels), self.cover_rate, generator)
        for index in torch.cat([victims, chosen]).split(500):
            clean = images[index].float() / 255
            seen = pieces(len(index), clean.shape[-2:], self.grid, self.kept, generator)
            images[index] = saturate(torch.where(seen, apply_trigger(trigger, clean), clean))
        return Poisoned(images, labels, victims, chosen)


def pieces(count: int, size: torch.Size, grid: int, kept: int, generator: torch.Generator) -> Tensor:
    """The pixels of ``kept`` random pieces of a ``grid`` x ``grid`` cut, for every image: bool ``[count, 1, H, W]``."""
    order = torch.rand(count, grid * grid, generator=generator).argsort(1)
    height, width = size
    row, column = torch.arange(height) * grid // height, torch.arange(width) * grid // width
    return (order < kept)[:, row[:, None] * grid + column][:, None]
