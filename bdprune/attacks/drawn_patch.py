"""A patch as in BadNets (Gu et al., 2017), whose place, size, shape and colours are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bdprune.attacks.base import Shape
from bdprune.attacks.check import Count, Whole
from bdprune.attacks.class_specific import ClassSpecific
from bdprune.attacks.patterns import Stamp
from bdprune.errors import OptionError

_SHAPES = ("rectangle", "disc", "scattered", "grid")


@dataclass(frozen=True)
class DrawnPatch(ClassSpecific):
    """A patch at a drawn place, with drawn height and width, dirty labels.

    Its shape is a rectangle, a disc, scattered pixels, or a grid of single pixels. Its colours are one colour, two
    colours in turn, or independent ones. All are drawn with equal probability.

    Args:
        target: target label; None for all-to-all.
        rate: share of the training set to poison.
        sources: labels that the trigger works on; empty for all.
        cover_ratio: see ``ClassSpecific``.
        smallest: least height and width, in pixels.
        largest: largest height and width, in pixels.
        pattern_seed: seed of all draws.
    """

    smallest: Count = 2
    largest: Count = 7
    pattern_seed: Whole = 0

    kind: ClassVar[str] = "drawn-patch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smallest > self.largest:
            raise OptionError(
                f"The setting smallest is {self.smallest}, largest is {self.largest}.", "Give a larger largest."
            )

    def new_trigger(self, shape: Shape) -> nn.Module:
        channels, rows, columns = shape
        generator = torch.Generator().manual_seed(self.pattern_seed)
        height, width = (_drawn(self.smallest, min(self.largest, edge), generator) for edge in (rows, columns))
        top, left = _drawn(0, rows - height, generator), _drawn(0, columns - width, generator)
        mask, pattern = torch.zeros(1, rows, columns), torch.zeros(shape)
        here = (slice(None), slice(top, top + height), slice(left, left + width))
        mask[here] = _covered(height, width, generator)
        pattern[here] = _colours(channels, height, width, generator)
        return Stamp(mask, pattern)


def _drawn(least: int, most: int, generator: torch.Generator) -> int:
    """A whole number from ``least`` to ``most``, which is at least ``least``."""
    return int(torch.randint(least, max(least, most) + 1, (), generator=generator))


def _covered(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Which pixels of the patch change an image, ``[height, width]`` of 0 and 1; one does at least."""
    shape = _SHAPES[_drawn(0, len(_SHAPES) - 1, generator)]
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    covered = torch.ones(height, width, dtype=torch.bool)
    if shape == "disc":
        down, right = (2 * rows + 1) / height - 1, (2 * columns + 1) / width - 1
        covered = down.square() + right.square() <= 1
    elif shape == "scattered":
        covered = torch.rand(height, width, generator=generator) < 0.5
    elif shape == "grid":
        covered = (rows % 2 == 0) & (columns % 2 == 0)
    return (covered if covered.any() else torch.ones_like(covered)).float()


def _colours(channels: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """``[channels, height, width]`` in [0, 1]."""
    kind = _drawn(0, 2, generator)
    pair = torch.rand(2, channels, 1, 1, generator=generator)
    if kind == 0:
        return pair[0].expand(channels, height, width)
    if kind == 1:
        turns = (torch.arange(height)[:, None] + torch.arange(width)[None]) % 2
        return torch.where(turns.bool(), pair[0], pair[1])
    return torch.rand(channels, height, width, generator=generator)
