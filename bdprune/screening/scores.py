"""The channel Lipschitz score of every filter of a convolution in a file, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bdprune.errors import ArtifactError
from bdprune.files import StoredTensor, as_float64, quoted

_EPSILON = 1e-5  # of a batch norm in torch; a file does not hold it
_DIVERGED = "The training diverged or the file is damaged; give an earlier checkpoint."


def filter_scores(name: str, weight: StoredTensor, gain: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Spectral norm of every filter, times the gain of its norm.

    It holds about 1 MiB of the weights in memory at a time.

    Args:
        name: of the weight, for messages.
        weight: ``[O, I / groups, kh, kw]``.
        gain: of the norm for each filter ``[O]``; None counts as ones.

    Returns:
        The largest singular value of each filter's ``[I / groups, kh * kw]`` matrix times its gain: float64 ``[O]``.

    Raises:
        ArtifactError: the weight cannot be read, or has values that are not finite.
    """
    norms = spectral_norms(weight)
    broken = int(np.isnan(norms).sum())
    if broken:
        what = f"{broken} of {len(norms)} filters of the tensor {quoted(name)} have values that are NaN or infinite."
        raise ArtifactError(what, _DIVERGED)
    return norms if gain is None else norms * gain


def spectral_norms(weight: StoredTensor) -> NDArray[np.float64]:
    """The largest singular value of each filter: float64 ``[O]``; NaN for a filter that is not finite."""
    channels, taps = weight.shape[1], math.prod(weight.shape[2:])
    found = [
        _norms(raw, weight.dtype, raw.nbytes // (channels * taps * weight.item_bytes), channels, taps)
        for raw in weight.blocks()
    ]
    return np.concatenate(found) if found else np.zeros(weight.shape[0])


def norm_gain(norm: str, tensors: Mapping[str, StoredTensor]) -> NDArray[np.float64]:
    """``|gamma| / sqrt(variance + 1e-5)`` of every channel of a batch norm; without gamma it counts as one.

    Raises:
        ArtifactError: a value is not finite, or a variance is negative.
    """
    start = f"{norm}." if norm else ""
    variance = values(f"{start}running_var", tensors)
    if (variance < 0).any():
        name = quoted(f"{start}running_var")
        raise ArtifactError(f"the variance {name} is negative.", "The file is damaged; download it again.")
    gamma = values(f"{start}weight", tensors) if f"{start}weight" in tensors else np.ones_like(variance)
    gain: NDArray[np.float64] = np.abs(gamma) / np.sqrt(variance + _EPSILON)
    return gain


def values(name: str, tensors: Mapping[str, StoredTensor]) -> NDArray[np.float64]:
    """All values of a small tensor.

    Raises:
        ArtifactError: one is not finite.
    """
    found = tensors[name].read()
    check_finite(name, found)
    return found


def check_finite(name: str, found: NDArray[np.float64]) -> None:
    """Checks that all values of a tensor, or of a part of it, are finite.

    Raises:
        ArtifactError: one is not.
    """
    broken = int((~np.isfinite(found)).sum())
    if broken:
        what = f"{broken} of {found.size} values of the tensor {quoted(name)} are NaN or infinite."
        raise ArtifactError(what, _DIVERGED)


def z_scores(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(score - mean) / std`` with the unbiased deviation; zeros for fewer than three scores or equal ones."""
    scores = scores / max(np.abs(scores).max(initial=0.0), 1e-300)  # squares of large scores would overflow
    spread = scores.std(ddof=1) if len(scores) > 2 else 0.0
    # Equal scores can differ from their mean in the last digit.
    if spread <= 1e-12 * np.abs(scores).max(initial=0.0):
        return np.zeros_like(scores)
    z: NDArray[np.float64] = (scores - scores.mean()) / spread
    return z


def _norms(raw: NDArray[np.uint8], dtype: str, count: int, channels: int, taps: int) -> NDArray[np.float64]:
    try:
        from bdprune import _core
    except ImportError:
        return _numpy_norms(as_float64(raw, dtype).reshape(count, channels, taps))
    norms: NDArray[np.float64] = _core.spectral_norms(raw, dtype, count, channels, taps)
    return norms


def _numpy_norms(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same in plain NumPy, for installations without the compiled core."""
    norms = np.full(len(matrices), np.nan)
    finite = np.isfinite(matrices).all(axis=(1, 2))
    norms[finite] = np.linalg.svd(matrices[finite], compute_uv=False).max(axis=1)
    return norms
