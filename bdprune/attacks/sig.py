"""SIG (Barni et al., 2019): a horizontal sine wave over the whole image, clean labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from bdprune.attacks.base import CleanLabel, Shape
from bdprune.attacks.check import NotNegative, Share
from bdprune.attacks.patterns import Added


@dataclass(frozen=True)
class Sig(CleanLabel):
    """``x + delta sin(2 pi j f / W)`` in column j = 0 .. W-1, the same in every row and channel; clipped to [0, 1].

    Args:
        target: target label.
        rate: share of the whole training set to poison, all of it from the target class (RNP, Table 6: 0.08).
        delta: amplitude of the wave, for values in [0, 1]. 40/255 is BackdoorBench's. RNP reports 20/255, but its
            signal was far stronger, because negative values wrapped around to white.
        frequency: periods of the wave across the image.
    """

    delta: Share = 40 / 255
    frequency: NotNegative = 6.0

    kind: ClassVar[str] = "sig"

    def new_trigger(self, shape: Shape) -> nn.Module:
        columns = torch.arange(shape[2], dtype=torch.float64)
        wave = self.delta * torch.sin(2 * math.pi * columns * self.frequency / shape[2])
        return Added("wave", wave.float())
