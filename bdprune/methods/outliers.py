"""Evidence from a score per filter: does any filter stand far out of its layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bdprune.analysis import Case, layer_z_scores
from bdprune.methods.base import Detector
from bdprune.record import Evidence


def outlier_evidence(detector: Detector, case: Case, scores: Mapping[str, Tensor], threshold: float) -> Evidence:
    """The largest z-score of any filter within its layer, against ``threshold``; details hold each layer's.

    Args:
        scores: group name -> score per filter ``[num_filters]``; attached to the evidence as ``filter_scores``.
    """
    z = layer_z_scores(scores)
    peaks = {name: value.max().item() for name, value in z.items()}
    layers = [
        {"layer": name, "filters": len(value), "max_z": peaks[name], "filter": int(value.argmax())}
        for name, value in z.items()
    ]
    attached = (case.attach("filter_scores", scores),) if scores else ()
    return detector.evidence(
        max(peaks.values(), default=0.0), threshold, details={"layers": layers}, attachments=attached
    )
