"""Statistics of the head, the last linear layer of a classifier: whether one label stands out in its weights.

The mean weight of a label's row is the signature of Fields et al., Trojan Signatures in DNN Weights (ICCV workshops
2021, arXiv 2109.02836). The others are of the same kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bdprune.files import StoredTensor
from bdprune.record import HeadScreen, HeadStatistic, LabelStatistic
from bdprune.screening.scores import check_finite, values

HEAD_THRESHOLDS: Mapping[LabelStatistic, float | None] = {"norm": 5.0, "mean": 6.0, "positive": 9.0, "bias": None}
"""Statistic -> largest robust z-score of a label that is not flagged; None if it is never flagged.

About 1.5 times the largest score of 26 clean networks of this package's zoos (docs/how-to/screen-without-torch.md). The
bias of a label shows how often it occurs in the training data, so no threshold applies to it.
"""

_FEWEST = 4
_MAD_TO_STD = 1.4826  # of a normal distribution
_FLAT = 1e-6  # of the median of the sizes: a smaller spread is rounding


def find_heads(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """The names of the weights that may be the last linear layer, in the order of their names, with numbers in order.

    It is a guess from names and shapes: a matrix ``weight`` with at least two rows, whose number of rows is not the
    number of columns of any other one, as nothing reads its output. All that remain are screened: a file may hold
    matrices that no network reads, and they must not hide the head.
    """
    found = {
        name: tensor.shape
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and tensor.is_floating_point() and name.rpartition(".")[2] == "weight"
    }
    columns = {shape[1] for shape in found.values()}
    last = [name for name, shape in found.items() if shape[0] not in columns and shape[0] > 1 and shape[1] > 0]
    return sorted(last, key=_natural)


def screen_head(name: str, tensors: Mapping[str, StoredTensor], start: str = "") -> HeadScreen:
    """How far one label stands out in each statistic of the rows of a head.

    Args:
        name: of the weight ``[K, F]``.
        tensors: all tensors of the network by name.
        start: text before the name of the layer in the record.

    Raises:
        ArtifactError: the head cannot be read, or has values that are not finite.
    """
    rows: dict[LabelStatistic, list[NDArray[np.float64]]] = {"norm": [], "mean": [], "positive": []}
    for block in tensors[name].float_blocks():
        check_finite(name, block)
        rows["norm"].append(np.sqrt(np.square(block).sum(axis=1)))
        rows["mean"].append(block.mean(axis=1))
        rows["positive"].append(np.maximum(block, 0).sum(axis=1))
    found = {kind: np.concatenate(parts) for kind, parts in rows.items()}
    bias, labels = f"{name.removesuffix('weight')}bias", tensors[name].shape[0]
    if bias in tensors and tensors[bias].shape == (labels,) and tensors[bias].is_floating_point():
        found["bias"] = values(bias, tensors)
    statistics = tuple(_statistic(kind, one) for kind, one in found.items()) if labels >= _FEWEST else ()
    layer = f"{start}{name.removesuffix('weight').removesuffix('.')}"
    return HeadScreen(layer=layer, labels=labels, statistics=statistics)


def robust_z(found: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance of every value from their median, in robust standard deviations (1.4826 MAD); zeros without a spread."""
    middle = np.median(found)
    spread = _MAD_TO_STD * np.median(np.abs(found - middle))
    if spread <= _FLAT * np.median(np.abs(found)):
        return np.zeros_like(found)
    z: NDArray[np.float64] = (found - middle) / spread
    return z


def _statistic(kind: LabelStatistic, found: NDArray[np.float64]) -> HeadStatistic:
    z, threshold = robust_z(found), HEAD_THRESHOLDS[kind]
    label = int(z.argmax())
    return HeadStatistic(
        statistic=kind,
        label=label,
        value=float(found[label]),
        z=float(z[label]),
        threshold=threshold,
        flagged=threshold is not None and float(z[label]) > threshold,
    )


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"([0-9]{1,8})", name)
    return [(int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)]
