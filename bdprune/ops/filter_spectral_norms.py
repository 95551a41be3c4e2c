"""Largest singular value of every filter of any number of convolutions, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bdprune.ops import _backend, reference
from bdprune.ops._check import check_floating, check_same_device


def filter_spectral_norms(weights: Sequence[Tensor], scales: Sequence[Tensor | None] | None = None) -> list[Tensor]:
    """Largest singular value of each filter's ``[I / groups, kh * kw]`` matrix, times ``|scale|`` if given.

    Args:
        weights: list of weights, each ``[O, I / groups, kh, kw]``, a stack of models
            ``[G, O, I / groups, kh, kw]`` or a linear layer's ``[O, I]`` (taken as a 1x1 convolution, so the norm is
            the L2 norm of the row); float16, bfloat16, float32 or float64, any strides, all on one device.
        scales: None, or one entry per weight: None or ``[O]`` (``[G, O]`` for a stack), such as the gain of the batch
            norm folded into the convolution, ``gamma / sqrt(var + eps)``.

    Returns:
        One tensor per weight, ``[O]`` or ``[G, O]``, float32 (float64 for a float64 weight). A filter that holds a NaN
        or Inf gives NaN and does not affect others; an empty one gives 0. No gradient flows.

    Raises:
        TypeError: an entry is not a floating tensor.
        ValueError: shapes, devices or the number of scales do not match.

    Precision: computes the largest eigenvalue of the Gram matrix on the smaller side. On the CPU, products of float32
    and narrower weights are summed in float32 over short runs and otherwise in float64; the rest is float64. The
    relative error is below 1.2e-7 on random filters and below 4e-7 if all rounding errors have the same sign (a filter
    of equal elements), smaller than for float32 ``svdvals``. On CUDA, and for float64 weights, all sums are float64,
    and the error is the rounding of the result to float32 (6e-8), or below 1e-14 in float64. This also holds for very
    large weights and for denormals. A filter's bits do not depend on the rest of the list or on the number of threads.

    Complexity: O(I k^2 min(I, k^2)) per filter for its Gram matrix, and O(min(I, k^2)^3) for the eigenvalue: on the CPU
    4/3 n^3 flops to make the matrix tridiagonal and three or four evaluations of its characteristic polynomial; on CUDA
    a fixed number of Jacobi sweeps.

    Source: the channel Lipschitz constant of Zheng et al., Data-free Backdoor Removal based on Channel Lipschitzness,
    ECCV 2022, eq. 7; Golub and Van Loan, Matrix Computations, sections 8.3.1 and 8.5, and Parlett, The Symmetric
    Eigenvalue Problem, section 8.11, for the eigenvalues.

    >>> weight = torch.zeros(2, 3, 3, 3)
    >>> weight[1, 0, 0, 0] = -2.0
    >>> filter_spectral_norms([weight], [torch.tensor([1.0, -3.0])])
    [tensor([0., 6.])]
    """
    weights = list(weights)
    scales = [None] * len(weights) if scales is None else list(scales)
    _check(weights, scales)
    if not weights:
        return []
    with torch.no_grad():
        flat = _flat_norms(weights, scales)
        parts = flat.split([_filters(weight).numel() for weight in weights])
        return [_shaped(norms, weight) for norms, weight in zip(parts, weights, strict=True)]


def _shaped(norms: Tensor, weight: Tensor) -> Tensor:
    """``norms`` in the shape and dtype for ``weight``; skips calls that would change nothing."""
    if weight.dim() == 5:
        norms = norms.view(weight.shape[:2])
    dtype = _out_dtype(weight)
    return norms if norms.dtype == dtype else norms.to(dtype)


def _filters(weight: Tensor) -> torch.Size:
    """``[O]``, or ``[G, O]`` of a stack."""
    return weight.shape[:2] if weight.dim() == 5 else weight.shape[:1]


def _flat_norms(weights: list[Tensor], scales: list[Tensor | None]) -> Tensor:
    if not _backend.is_native(weights[0]):
        return reference.filter_spectral_norms(weights, scales)
    detached = [None if scale is None else _detached(scale) for scale in scales]
    values: Tensor = torch.ops.bdprune.filter_spectral_norms([_detached(weight) for weight in weights], detached)
    return values


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _out_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _check(weights: list[Tensor], scales: list[Tensor | None]) -> None:
    if len(scales) != len(weights):
        raise ValueError(f"scales must have one entry per weight, got {len(scales)} for {len(weights)} weights")
    for i, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        check_floating(f"weights[{i}]", weight)
        if weight.dim() not in (2, 4, 5):
            shape = list(weight.shape)
            raise ValueError(f"weights[{i}] must be [O, I], [O, I, kh, kw] or [G, O, I, kh, kw], got shape {shape}")
        check_same_device(f"weights[{i}]", weight, weights[0].device)
        if scale is None:
            continue
        check_floating(f"scales[{i}]", scale)
        check_same_device(f"scales[{i}]", scale, weights[0].device)
        if scale.shape != _filters(weight):
            raise ValueError(f"scales[{i}] must have shape {list(_filters(weight))}, got {list(scale.shape)}")


def _fake(weights: list[Tensor], scales: list[Tensor | None]) -> Tensor:
    total = sum(_filters(weight).numel() for weight in weights)
    wide = any(weight.dtype == torch.float64 for weight in weights)
    return weights[0].new_empty(total, dtype=torch.float64 if wide else torch.float32)


if _backend.HAS_OPS:
    torch.library.register_fake("bdprune::filter_spectral_norms", _fake)
