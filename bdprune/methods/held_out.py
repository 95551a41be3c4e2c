"""The clean images that a repair learns from, those that it decides on, and what it costs on these."""

from __future__ import annotations

import math

import torch

from bdprune.data import CleanData
from bdprune.errors import DataError, OptionError
from bdprune.model import Model
from bdprune.runtime import predict

LARGEST_ERROR = 0.03
"""Largest standard error that :func:`sure_drop` subtracts: few images must not excuse any damage."""


def hold_out(data: CleanData, share: float, seed: int) -> tuple[CleanData, CleanData]:
    """The images to learn from, and the images held out for decisions, both with all classes that have two images.

    Args:
        data: clean images.
        share: of each class that is held out, in (0, 1).
        seed: of the draw.

    Raises:
        DataError: no class has an image to hold out.
        OptionError: the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise OptionError(f"The share of the images to hold out is {share}.", "Give a share between 0 and 1.")
    rest, held = data.split(share, torch.Generator().manual_seed(seed))
    if not len(held):
        raise DataError(
            f"{len(data)} clean images, one of each class, leave none to hold out for choosing a threshold.",
            "Give at least two images of a class, or use the method suspiciousness without a check.",
        )
    return rest, held


def sure_drop(before: Model, after: Model, held: CleanData) -> float:
    """Fall of clean accuracy from one model to another, less its standard error (at most 0.03), in [-1, 1].

    This is the one-standard-error rule (Breiman et al., 1984): 150 images cannot distinguish a fall of 2 points from
    one of 4. The error is that of the paired differences, so images that both models label alike add nothing to it.

    Args:
        held: images that the repair did not learn from.
    """
    hits = [(predict(one.module, held.images) == held.labels).double() for one in (before, after)]
    lost = hits[0] - hits[1]
    error = float(lost.std()) / math.sqrt(len(held)) if len(held) > 1 else 0.0
    return float(lost.mean()) - min(error, LARGEST_ERROR)
