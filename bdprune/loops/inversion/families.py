"""The families of triggers: their variables, how they change an image, and their size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from bdprune.ops import stamp
from bdprune.record import TriggerKind

_START = 0.05  # opacity of a mask at the start
_FAINT = 2 / 255  # standard deviation of the first additive patterns
_GRID = 4  # control points on each side of a warp (WaNet's k)
_REACH = 0.15  # largest displacement of a control point, as a share of the shorter side of an image
_STILL = 0.01  # standard deviation of the first warps


class Family(ABC):
    """A family of triggers; it has no state.

    Attributes:
        kind: its name in records.
    """

    kind: ClassVar[TriggerKind]

    @abstractmethod
    def start(self, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> list[Tensor]:
        """The first variables of ``count`` triggers ``[count, *]`` for images ``shape`` (C, h, w), on the CPU."""

    @abstractmethod
    def tensors(self, variables: Sequence[Tensor], shape: tuple[int, int, int]) -> tuple[Tensor | None, Tensor]:
        """Masks ``[H, 1, h, w]`` (None if the family has none) and patterns ``[H, *, h, w]`` of the variables."""

    @abstractmethod
    def apply(self, images: Tensor, masks: Tensor | None, patterns: Tensor, picks: Tensor | None = None) -> Tensor:
        """Images with the triggers ``[H, N, C, h, w]``; arguments as for :func:`bdprune.ops.stamp`."""

    @abstractmethod
    def strength(self, masks: Tensor | None, patterns: Tensor) -> Tensor:
        """How much each pixel changes ``[H, h, w]``; the size of a trigger is the sum."""

    def largest(self, shape: Sequence[int]) -> float:
        """The largest strength of a pixel of images ``shape`` (C, h, w)."""
        return 1.0

    def sizes(self, masks: Tensor | None, patterns: Tensor) -> Tensor:
        """Size of each trigger ``[H]``."""
        return self.strength(masks, patterns).flatten(1).sum(1)


class Patch(Family):
    """A mask ``sigmoid(a)`` and a pattern ``sigmoid(b)``: the pattern covers the image where the mask is opaque."""

    kind = "patch"

    def start(self, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> list[Tensor]:
        opacity = torch.full((count, 1, *shape[1:]), _START).logit()
        return [opacity, torch.randn(count, *shape, generator=generator)]

    def tensors(self, variables: Sequence[Tensor], shape: tuple[int, int, int]) -> tuple[Tensor | None, Tensor]:
        return variables[0].sigmoid(), variables[1].sigmoid()

    def apply(self, images: Tensor, masks: Tensor | None, patterns: Tensor, picks: Tensor | None = None) -> Tensor:
        return stamp(images, masks, patterns, picks)

    def strength(self, masks: Tensor | None, patterns: Tensor) -> Tensor:
        assert masks is not None
        return masks[:, 0]


class Additive(Family):
    """A change of the colours ``tanh(b)``, added to the image and clipped; its strength is the largest of a pixel."""

    kind = "additive"

    def start(self, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> list[Tensor]:
        return [_FAINT * torch.randn(count, *shape, generator=generator)]

    def tensors(self, variables: Sequence[Tensor], shape: tuple[int, int, int]) -> tuple[Tensor | None, Tensor]:
        return None, variables[0].tanh()

    def apply(self, images: Tensor, masks: Tensor | None, patterns: Tensor, picks: Tensor | None = None) -> Tensor:
        return stamp(images, None, patterns, picks)

    def strength(self, masks: Tensor | None, patterns: Tensor) -> Tensor:
        return patterns.abs().amax(1)


class Warp(Family):
    """A smooth displacement of the pixels, from a grid of 4x4 control points (the trigger of WaNet, Nguyen and Tran,
    ICLR 2021); its strength is the length of the displacement, in pixels.

    The pattern is ``[2, h, w]``: where each pixel takes its colour from, to the right and downwards, in pixels.
    """

    kind = "warp"

    def start(self, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> list[Tensor]:
        return [_STILL * torch.randn(count, 2, _GRID, _GRID, generator=generator)]

    def tensors(self, variables: Sequence[Tensor], shape: tuple[int, int, int]) -> tuple[Tensor | None, Tensor]:
        size = list(shape[1:])
        return None, functional.interpolate(
            self.largest(shape) * variables[0].tanh(), size, mode="bicubic", align_corners=True
        )

    def apply(self, images: Tensor, masks: Tensor | None, patterns: Tensor, picks: Tensor | None = None) -> Tensor:
        given = images.expand(len(patterns), *images.shape) if picks is None else images[picks]
        height, width = images.shape[2:]
        columns, rows = (torch.linspace(-1, 1, edge, device=images.device) for edge in (width, height))
        still = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)  # [h, w, 2]
        spans = torch.tensor([2 / max(width - 1, 1), 2 / max(height - 1, 1)], device=images.device)
        grids = (still + patterns.permute(0, 2, 3, 1) * spans).clamp(-1, 1)
        # A batch of N * C channels per trigger needs one grid for each trigger, not for each image.
        flat = given.flatten(1, 2)
        warped = functional.grid_sample(flat, grids.to(flat.dtype), align_corners=True)
        return warped.view(given.shape)

    def largest(self, shape: Sequence[int]) -> float:
        return _REACH * min(shape[1:])

    def strength(self, masks: Tensor | None, patterns: Tensor) -> Tensor:
        return patterns.square().sum(1).clamp(min=1e-12).sqrt()


FAMILIES: Mapping[TriggerKind, Family] = {one.kind: one for one in (Patch(), Additive(), Warp())}
"""The families by kind."""
