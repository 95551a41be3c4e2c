"""Shared by the tests of the ops: the error measure, dtypes and the list of difficult shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from bdprune.ops import _backend

native = pytest.mark.skipif(not _backend.HAS_OPS, reason="the compiled ops are not built or switched off")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

STACKS = [(3, 2, 5, 4, 6), (2, 1, 64, 3, 3), (4, 3, 7), (1, 2, 6, 5, 5), (2, 600, 3, 1, 1), (3, 2, 4, 2, 3, 2)]
"""Shapes of stacks of maps [G, N, C, *]."""


def assert_error_ratio(ours: Tensor, plain: Tensor, exact: Tensor, allowance: float = 0.0) -> None:
    """Asserts that ``ours`` errs at most twice as much as ``plain``, the same computation by plain PyTorch in the same
    dtype, both against the float64 result ``exact``. ``allowance`` is an absolute error that is always
    allowed: for results that plain PyTorch computes exactly, and for float64, where ``exact`` itself is rounded."""
    assert ours.shape == plain.shape == exact.shape
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    assert ours.double().isfinite().all()
    error = (ours.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item() + allowance
    assert error <= allowed, f"error {error:.3g} is above {allowed:.3g}"


def rounding(exact: Tensor, dtype: torch.dtype, terms: int = 1) -> float:
    """The error of two roundings of the largest value of ``exact`` to ``dtype``, which no result can avoid. In float64,
    one rounding per term, because ``exact`` is a sum of ``terms`` in the same precision."""
    if exact.numel() == 0:
        return 0.0
    roundings = max(2, terms) if dtype == torch.float64 else 2
    return roundings * exact.abs().max().item() * torch.finfo(dtype).eps


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs its block with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> Tensor:
    """Standard normal values, drawn in float64 so that every dtype sees the same ones rounded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(device=device, dtype=dtype)


def layouts(x: Tensor) -> list[Tensor]:
    """The same values in several memory orders: plain, channels_last, with gaps, with transposed axes."""
    strided = x.new_zeros(x.shape[0], 2 * x.shape[1], *x.shape[2:])[:, ::2].copy_(x)
    permuted = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return [x, x.movedim(1, -1).contiguous().movedim(-1, 1), strided, permuted]


def stack_layouts(z: Tensor) -> list[Tensor]:
    """A stack [G, N, C, *] in plain and channels_last order, with gaps, and one map for all its entries."""
    channels_last = z.movedim(2, -1).contiguous().movedim(-1, 2)
    strided = torch.cat([z, z], 1)[:, ::2]
    return [z, channels_last, strided, z[:1].expand_as(z)]
