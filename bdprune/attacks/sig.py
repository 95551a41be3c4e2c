"""SIG (Barni et al., 2019): a horizontal sine wave over the whole image, clean labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bdprune.attacks.base import Shape, TriggerType
from bdprune.attacks.check import check_at_least, check_share
from bdprune.attacks.clean_label import CleanLabel


@dataclass(frozen=True)
class Sig(CleanLabel):
    """``x + delta sin(2 pi j f / W)`` in column j = 0 .. W-1, the same in every row and channel; clipped to [0, 1].

    Args:
        target: label that the trigger calls.
        rate: share of the whole training set that is poisoned, all of it from the target class (RNP, Table 6: 0.08).
        delta: amplitude of the wave, for values in [0, 1]. 40/255 is BackdoorBench's. RNP names 20/255, but the signal
            it was measured with had its negative half wrapped around to white, and was far stronger than that.
        frequency: periods of the wave across the image.
    """

    delta: float = 40 / 255
    frequency: float = 6.0

    kind: ClassVar[str] = "sig"
    trigger_type: ClassVar[TriggerType] = "static"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("delta", self.delta)
        check_at_least("frequency", self.frequency, 0)

    def new_trigger(self, shape: Shape) -> nn.Module:
        columns = torch.arange(shape[2], dtype=torch.float64)
        wave = self.delta * torch.sin(2 * math.pi * columns * self.frequency / shape[2])
        return Wave(wave.float())


class Wave(nn.Module):
    """Adds a wave ``[W]`` to every row and clips to [0, 1]."""

    wave: Tensor

    def __init__(self, wave: Tensor) -> None:
        super().__init__()
        self.register_buffer("wave", wave)

    def forward(self, images: Tensor) -> Tensor:
        return (images + self.wave.to(images)).clamp(0, 1)
