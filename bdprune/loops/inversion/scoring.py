"""How far a recovered trigger stands out from the others by its size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


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
