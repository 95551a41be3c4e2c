"""A benchmark: variants of one computation, the error of each, and the least work that the task needs."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Kind = Literal["author", "eager", "compile", "ours", "required", "alternative"]
"""``required``: work that every variant must do, timed alone. ``alternative``: another method for the same purpose."""

Error = Callable[[Any], float]


@dataclass(frozen=True)
class Variant:
    """One implementation.

    Attributes:
        name: a few words, unique within its benchmark.
        kind: who wrote it and how.
        call: runs it once; the clock times this call.
        scale: calls in one whole run. A row shows the time of one call times this number.
        note: what a reader must know about the row, such as the part that was timed.
        exact: whether the benchmark's error function applies to the output.
    """

    name: str
    kind: Kind
    call: Callable[[], Any]
    scale: float = 1.0
    note: str = ""
    exact: bool = True


@dataclass(frozen=True)
class Work:
    """The least work of one part: bytes read and written, and floating point operations.

    The parts of a benchmark run one after another. Within a part, memory and arithmetic may overlap.
    """

    bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Benchmark:
    """All variants of one computation.

    Attributes:
        name: the op or method.
        case: sizes.
        variants: in the order of the table.
        work: least work of one whole run, part by part; empty if ``lower_bound_variant`` is set.
        error: largest error of an output, compared with float64; None if there is nothing to compare.
        error_name: which error it is, and whether it is relative.
        lower_bound_variant: the variant whose time is the lower bound, if neither bytes nor FLOPs limit the task.
        seconds: time to repeat all variants, without their first calls.
        host: use the wall clock, because the host's work counts; otherwise use the device's events.
        peak: gets the peak memory in bytes from an output, for work in another process.
    """

    name: str
    case: str
    variants: tuple[Variant, ...]
    work: tuple[Work, ...] = ()
    error: Error | None = None
    error_name: str = ""
    lower_bound_variant: str | None = None
    seconds: float = 10.0
    host: bool = False
    peak: Callable[[Any], int] | None = None


def relative_error(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """Largest error over all pairs of tensors, relative to the largest exact magnitude of each pair. NaN stays NaN."""
    errors = []
    for ours, exact in zip(found, truth, strict=True):
        scale = exact.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        errors.append((ours.to(exact.device).double() - exact).abs().max() / scale)
    return torch.stack(errors).max().item()


def absolute_error(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """Largest absolute error over all pairs of tensors. NaN stays NaN."""
    pairs = zip(found, truth, strict=True)
    return max_or_nan([(ours.to(exact.device).double() - exact).abs().max().item() for ours, exact in pairs])


def max_or_nan(values: Sequence[float]) -> float:
    """The largest value, or NaN if one value is NaN: a variant that returns NaN must not look exact."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def can_compile(device: torch.device) -> bool:
    """Whether ``torch.compile`` works here: it needs a C++ compiler, and Triton on CUDA."""
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    return compiler is not None and (device.type == "cpu" or importlib.util.find_spec("triton") is not None)


def compiled(
    device: torch.device, name: str, function: Callable[..., Any], use: Callable[[Callable[..., Any]], Any]
) -> tuple[Variant, ...]:
    """A variant that calls ``use(torch.compile(function))``; empty if nothing can be compiled."""
    if not can_compile(device):
        return ()
    fast = torch.compile(function, dynamic=False)
    return (Variant(f"torch.compile: {name}", "compile", lambda: use(fast)),)
