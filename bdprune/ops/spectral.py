"""Largest singular value of every filter of any number of convolutions, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bdprune.ops import _backend, reference
from bdprune.ops._check import check_floating, check_same_device


def filter_spectral_norms(weights: Sequence[Tensor], scales: Sequence[Tensor | None] | None = None) -> list[Tensor]:
    """Largest singular value of each filter's ``[I / groups, kh * kw]`` matrix, times ``|scale|`` where one is given.

    Args:
        weights: any number of weights, each ``[O, I / groups, kh, kw]``, a stack of models
            ``[G, O, I / groups, kh, kw]`` or a linear layer's ``[O, I]`` (taken as a 1x1 convolution, so the norm is
            the L2 norm of the row); float16, bfloat16, float32 or float64, any strides, all on one device.
        scales: None, or one entry per weight: None or ``[O]`` (``[G, O]`` for a stack), such as the gain of the batch
            norm folded into the convolution, ``gamma / sqrt(var + eps)``.

    Returns:
        One tensor per weight, ``[O]`` or ``[G, O]``, float32 (float64 for a float64 weight). A filter that holds a NaN
        or Inf gives NaN and spoils no other; an empty one gives 0. No gradient flows.

    Raises:
        TypeError: an entry is not a floating tensor.
        ValueError: shapes, devices or the number of scales do not fit.

    Precision: the Gram matrix on the smaller side and its eigenvalues are computed in float64, so the relative error is
    that of rounding the result (6e-8 for float32 output, a few 1e-16 for float64). A filter's bits do not depend on the
    rest of the list or on the number of threads.

    Complexity: O(I k^2 min(I, k^2)) per filter plus a fixed number of Jacobi sweeps of O(min(I, k^2)^3).

    Source: the channel Lipschitz constant of Zheng et al., Data-free Backdoor Removal based on Channel Lipschitzness,
    ECCV 2022, eq. 7; Golub and Van Loan, Matrix Computations, section 8.5 for the Jacobi method.

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
        shapes = [_filters(weight) for weight in weights]
        parts = torch.split(flat, [shape.numel() for shape in shapes])
        return [
            norms.view(shape).to(_out_dtype(weight))
            for norms, shape, weight in zip(parts, shapes, weights, strict=True)
        ]


def _filters(weight: Tensor) -> torch.Size:
    """``[O]``, or ``[G, O]`` of a stack."""
    return weight.shape[:2] if weight.dim() == 5 else weight.shape[:1]


def _flat_norms(weights: list[Tensor], scales: list[Tensor | None]) -> Tensor:
    if not _backend.is_native(weights[0]):
        return reference.filter_spectral_norms(weights, scales)
    detached = [None if scale is None else scale.detach() for scale in scales]
    values: Tensor = torch.ops.bdprune.filter_spectral_norms([weight.detach() for weight in weights], detached)
    return values


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
