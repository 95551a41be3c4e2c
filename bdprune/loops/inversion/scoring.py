"""How far a recovered trigger stands out from the others by its size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def size_scores(sizes: Sequence[float], targeted: Sequence[bool], most: float) -> list[float]:
    """:func:`size_score` of each trigger of one kind among the others with a target.

    Args:
        sizes: in pixels; infinite for a trigger that was never successful, which counts with the largest size.
        targeted: whether each leads to one label.
        most: the largest possible size.
    """
    limited = [size if math.isfinite(size) else most for size in sizes]
    return [
        size_score(size, [other for at, other in enumerate(limited) if at != place and targeted[at]])
        for place, size in enumerate(sizes)
    ]


def size_score(size: float, others: Sequence[float]) -> float:
    """The geometric mean of two ratios to ``size``: of the smallest and of the median of ``others``.

    The smallest one alone may be small by chance, and the median grows with the labels that are hard to reach.

    Args:
        size: of the trigger, in pixels.
        others: sizes of the others, finite.

    Returns:
        0 for a trigger that was never successful, and if there are no others.
    """
    if not math.isfinite(size) or not others:
        return 0.0
    return math.sqrt(min(others) * statistics.median(others)) / max(size, 1e-6)


def least_rate(rates: Sequence[float | None], default: float) -> float:
    """The smallest flip rate; the default if none was measured."""
    return min((one for one in rates if one is not None), default=default)


def risen(old: Sequence[float | None], new: Sequence[float | None], goal: float) -> list[int]:
    """Places of the flip rates that rose; one that had reached the goal stays, because its trigger is smaller."""
    pairs = enumerate(zip(old, new, strict=True))
    return [place for place, (a, b) in pairs if a is not None and b is not None and a < min(b, goal)]
