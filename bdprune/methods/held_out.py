"""Splits the clean images of a repair into those that it learns from and those that it decides on."""

from __future__ import annotations

import torch

from bdprune.data import CleanData
from bdprune.errors import DataError


def hold_out(data: CleanData, share: float, seed: int) -> tuple[CleanData, CleanData]:
    """The images to learn from, and the images held out for decisions, both with all classes that have two images.

    Args:
        data: clean images.
        share: of each class that is held out, in (0, 1).
        seed: of the draw.

    Raises:
        DataError: no class has an image to hold out.
    """
    rest, held = data.split(share, torch.Generator().manual_seed(seed))
    if not len(held):
        raise DataError(
            f"{len(data)} clean images, one of each class, leave none to hold out for choosing a threshold.",
            "Give at least two images of a class, or use the method suspiciousness.",
        )
    return rest, held
