"""What a ladder is: rungs that compute the same thing, how far each is from the truth, and the least work it takes."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Kind = Literal["author", "eager", "compile", "ours", "bound", "rival"]
"""``bound`` is work that no rung can do without, timed for comparison; ``rival`` is another method with that aim."""

Error = Callable[[Any], float]


@dataclass(frozen=True)
class Rung:
    """One way to compute it.

    Attributes:
        name: what is done, in a few words; unique within its ladder.
        kind: where on the ladder it stands.
        call: does it once; the clock runs around this.
        scale: how many calls one whole run takes. What a row shows is the time of one call times this.
        note: what a reader must know about the row, such as how much of it was timed.
        exact: whether the output is what the ladder's error measures.
    """

    name: str
    kind: Kind
    call: Callable[[], Any]
    scale: float = 1.0
    note: str = ""
    exact: bool = True


@dataclass(frozen=True)
class Work:
    """The least that a part must do: bytes through memory, and floating point operations.

    Parts of a ladder follow one another; within a part, memory and arithmetic may overlap.
    """

    bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Ladder:
    """All rungs of one computation.

    Attributes:
        name: the op or method.
        case: sizes.
        rungs: in the order of the table.
        work: least work of one whole run, part by part; empty where ``floor_rung`` says the floor.
        error: largest error of an output against float64; None where there is nothing to compare.
        error_name: what that error is of, and whether it is relative.
        floor_rung: name of the rung whose time is the floor, where neither bytes nor FLOPs are what bounds it.
        seconds: how long to repeat all rungs together, apart from their first calls.
        host: time by the wall clock, because the host's own work is part of it; otherwise by the device's events.
        peak: reads the peak memory in bytes off an output, for work that runs in another process.
    """

    name: str
    case: str
    rungs: tuple[Rung, ...]
    work: tuple[Work, ...] = ()
    error: Error | None = None
    error_name: str = ""
    floor_rung: str | None = None
    seconds: float = 10.0
    host: bool = False
    peak: Callable[[Any], int] | None = None


def relative_error(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """Largest error over all pairs of tensors, each relative to the largest magnitude of its truth; NaN counts."""
    errors = []
    for ours, exact in zip(found, truth, strict=True):
        scale = exact.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        errors.append((ours.to(exact.device).double() - exact).abs().max() / scale)
    return torch.stack(errors).max().item()


def absolute_error(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """Largest error over all pairs of tensors; NaN counts."""
    pairs = zip(found, truth, strict=True)
    return max_or_nan([(ours.to(exact.device).double() - exact).abs().max().item() for ours, exact in pairs])


def max_or_nan(values: Sequence[float]) -> float:
    """The largest value, NaN if one of them is: a rung that gives NaN must not look exact."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def can_compile(device: torch.device) -> bool:
    """Whether ``torch.compile`` has what it needs here: a C++ compiler, on CUDA Triton as well."""
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    return compiler is not None and (device.type == "cpu" or importlib.util.find_spec("triton") is not None)


def compiled(
    device: torch.device, name: str, function: Callable[..., Any], use: Callable[[Callable[..., Any]], Any]
) -> tuple[Rung, ...]:
    """The rung that does ``use(torch.compile(function))``; empty where nothing can be compiled."""
    if not can_compile(device):
        return ()
    fast = torch.compile(function, dynamic=False)
    return (Rung(f"torch.compile: {name}", "compile", lambda: use(fast)),)
