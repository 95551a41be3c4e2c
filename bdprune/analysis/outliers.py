"""How far one label stands out among the labels of a network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_USUAL = 10
"""From this number of labels on, thresholds do not depend on it."""

FEWEST_LABELS = 4
"""With fewer labels, none can stand out."""

UNRESPONSIVE = "The logits do not depend on the image."
"""Why a network that ignores its input cannot be examined."""

_MAD_TO_STD = 1.4826  # of a normal distribution
_TINY = 1e-9
_NEWTON_STEPS = 5  # from a start that is within 1.5 % of the solution


def robust_z(values: Tensor) -> Tensor:
    """Distance of every value ``[K]`` from their median, in robust standard deviations (1.4826 MAD).

    NaN counts as missing and stays NaN. If more than half of the values are equal, such as those of outputs that are
    not in use, the MAD is 0 and says nothing about the others, so all z-scores are 0.
    """
    distances = values - median(values)
    spread = _MAD_TO_STD * median(distances.abs())
    if not spread > _TINY * distances.abs().nan_to_num().amax():
        return torch.where(values.isnan(), torch.nan, 0.0)
    return distances / spread


def median(values: Tensor) -> Tensor:
    """The median without NaN; of an even number of values the mean of the middle two (``torch.median``: the lower)."""
    return values.nanquantile(0.5)


def gamma_p_values(values: Tensor) -> Tensor:
    """Chance that the largest of ``K`` values of a gamma distribution is at least each of the values ``[K]``, float64.

    The distribution starts at 0 and is fitted by maximum likelihood to all positive values but the largest (Wang et
    al., IEEE S&P 2024, MM-BD). Values of 0 and less are those of outputs that are not in use. They are left out, and
    their chance is 1; so is every chance if fewer than four values are positive. NaN counts as missing and stays NaN.
    """
    chances = torch.where(values.isnan(), torch.nan, 1.0).double()
    used = values > 0
    known = values[used].double()
    if len(known) >= FEWEST_LABELS:
        shape, scale = _fit_gamma(known.sort().values[:-1])
        above = torch.special.gammaincc(shape, known / scale)
        chances[used] = -torch.expm1(len(known) * torch.log1p(-above))
    return chances


def _fit_gamma(values: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and scale of the gamma distribution of the largest likelihood; Newton's method for the shape."""
    mean = values.mean()
    gap = (mean.log() - values.log().mean()).clamp(min=_TINY)
    shape = (3 - gap + ((gap - 3) ** 2 + 24 * gap).sqrt()) / (12 * gap)
    for _ in range(_NEWTON_STEPS):
        excess = shape.log() - torch.special.digamma(shape) - gap
        shape = 1 / (1 / shape + excess / (shape - shape**2 * torch.special.polygamma(1, shape)))
    return shape, mean / shape


@torch.no_grad()
def why_unresponsive(logits: Callable[[Tensor], Tensor], images: Tensor) -> str:
    """That the network ignores its input, as a sentence; empty if it does not.

    Args:
        logits: images -> logits.
        images: ``[N, C, H, W]`` on the device of the network; they are compared with their negatives.
    """
    return "" if bool((logits(images) != logits(1 - images)).any()) else UNRESPONSIVE


def why_no_outlier(count: int) -> str:
    """Why none of ``count`` labels can stand out among the others, as a sentence; empty if one can."""
    if count >= FEWEST_LABELS:
        return ""
    return f"With {count} labels there are too few for one of them to be an outlier."


def for_few_labels(num_classes: int, usual: float, for_two: float) -> float:
    """A threshold for a network of ``num_classes`` labels, between those for ten labels or more and for two.

    With fewer labels, a label has fewer others to be compared with, so clean networks reach higher scores. The
    threshold changes in proportion to 1 / (K - 1).

    Args:
        num_classes: K.
        usual: the threshold for ten labels or more.
        for_two: the threshold for two labels.
    """
    least = 1 / (_USUAL - 1)
    few = max(1 / max(num_classes - 1, 1) - least, 0.0) / (1 - least)
    return usual + few * (for_two - usual)
