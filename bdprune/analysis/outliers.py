"""How far one label stands out among the labels of a network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

UNRESPONSIVE = "The logits do not depend on the image."
"""Why a network that ignores its input cannot be examined."""

_FEWEST = 4
_MAD_TO_STD = 1.4826  # of a normal distribution
_TINY = 1e-9


def robust_z(values: Tensor) -> Tensor:
    """Distance of every value ``[K]`` from their median, in robust standard deviations (1.4826 MAD).

    NaN counts as missing. Values that are all equal have a z-score of 0.
    """
    middle = values.nanmedian()
    spread = _MAD_TO_STD * (values - middle).abs().nanmedian()
    return torch.nan_to_num((values - middle) / spread.clamp(min=_TINY))


@torch.no_grad()
def why_unresponsive(logits: Callable[[Tensor], Tensor], images: Tensor) -> str:
    """That the network ignores its input, as a sentence; empty if it does not.

    Args:
        logits: images -> logits.
        images: ``[N, C, H, W]`` on the device of the network; they are compared with their negatives.
    """
    return "" if bool((logits(images) != logits(1 - images)).any()) else UNRESPONSIVE


def why_no_outlier(num_classes: int) -> str:
    """Why no label can stand out among the others, as a sentence; empty if one can."""
    if num_classes >= _FEWEST:
        return ""
    return f"With {num_classes} classes there are too few labels for one of them to be an outlier."
