"""WaNet (Nguyen and Tran, 2021): one fixed, smooth, small warp of the image, dirty labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.attacks.base import Attack, AttackSetting, Poisoned, Shape, TriggerType, draw_covers, saturate
from bdprune.attacks.check import NotNegative, Range


@dataclass(frozen=True)
class WaNet(Attack):
    """Samples the image at ``clip(id + strength n / size)``, in coordinates from -1 to 1.

    The field n is uniform noise of ``cells`` x ``cells`` points divided by its mean magnitude, enlarged bicubically to
    the image size; it is drawn once, from its own seed. Noise mode: cover images keep their label and are warped by
    the same field with new uniform jitter of up to one part in ``size`` on every pixel, so that no other warp leads to
    the target. A warp only mixes neighbouring pixels and stays in [0, 1].

    Args:
        target: target label; None for all-to-all.
        rate: share of the training set to poison (the paper and RNP, Table 6: 0.1).
        cover_ratio: cover images per poisoned image (the paper: 2).
        strength: s of the paper (0.5), the mean displacement in parts of ``size``.
        cells: k of the paper (4).
        field_seed: seed of the field.
    """

    cover_ratio: NotNegative = 2.0
    strength: NotNegative = 0.5
    cells: Annotated[int, Range(2)] = 4
    field_seed: int = 0

    kind: ClassVar[str] = "wanet"
    trigger_type: ClassVar[TriggerType] = "input-dependent"

    def new_trigger(self, shape: Shape) -> nn.Module:
        _, height, width = shape
        generator = torch.Generator().manual_seed(self.field_seed)
        coarse = 2 * torch.rand(1, 2, self.cells, self.cells, generator=generator) - 1
        coarse = coarse / coarse.abs().mean()
        field = functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        size = torch.tensor([width, height])
        return Warp((torch.stack([x, y], 2) + self.strength * field / size).clamp(-1, 1))

    def poison(self, setting: AttackSetting, trigger: nn.Module, generator: torch.Generator) -> Poisoned:
        """Dirty labels; ``cover_ratio`` times as many of the other images become covers."""
        done = super().poison(setting, trigger, generator)
        chosen = draw_covers(done.triggered, len(done.labels), self.cover_ratio * self.rate, generator)
        for index in chosen.split(500):
            done.images[index] = saturate(jittered(trigger, setting.images[index].float() / 255, generator))
        return Poisoned(done.images, done.labels, done.triggered, chosen)


class Warp(nn.Module):
    """Samples every image, bilinearly, at a grid ``[H, W, 2]`` of (x, y) from -1 (first pixel) to 1 (last)."""

    grid: Tensor

    def __init__(self, grid: Tensor) -> None:
        super().__init__()
        self.register_buffer("grid", grid)

    def forward(self, images: Tensor) -> Tensor:
        return warped(images, self.grid.to(images).expand(len(images), -1, -1, -1))


def warped(images: Tensor, grids: Tensor) -> Tensor:
    """Images ``[N, C, H, W]`` sampled at ``grids`` ``[N, H, W, 2]``."""
    return functional.grid_sample(images, grids, align_corners=True)


def jittered(trigger: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    """Images warped by the trigger's field plus uniform jitter, independent for every image and pixel."""
    count, _, height, width = images.shape
    jitter = (2 * torch.rand(count, height, width, 2, generator=generator) - 1) / torch.tensor([width, height])
    return warped(images, (trigger.get_buffer("grid") + jitter).clamp(-1, 1))
