"""Evidence from a score per filter: does any filter stand far out of its layer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bdprune.analysis import layer_z_scores
from bdprune.methods import Evidence


def outlier_evidence(
    detector: str, scores: Mapping[str, Tensor], threshold: float, start: float, params: dict[str, Any]
) -> Evidence:
    """The largest z-score of any filter within its layer, against ``threshold``; details hold each layer's.

    Args:
        scores: group name -> score per filter ``[num_filters]``.
        start: when the detector began, by ``time.perf_counter``.
    """
    z = layer_z_scores(scores)
    peaks = {name: value.max().item() for name, value in z.items()}
    score = max(peaks.values(), default=0.0)
    return Evidence(
        detector=detector,
        score=score,
        threshold=threshold,
        flagged=score > threshold,
        seconds=time.perf_counter() - start,
        params=params,
        details={
            "layers": [
                {"layer": name, "filters": len(value), "max_z": peaks[name], "filter": int(value.argmax())}
                for name, value in z.items()
            ]
        },
    )
