"""The physical floor: what this machine copies and multiplies at best, measured in the same run as the rungs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.ladders.ladder import Work
from bench.ladders.timing import Clock, device_clock


@dataclass(frozen=True)
class Ceilings:
    """Best rates seen.

    Attributes:
        copy: bytes a second of a copy, read and written bytes both counted.
        gemm: floating point operations a second of a float32 matrix product, no TF32.
    """

    copy: float
    gemm: float


def measure_ceilings(device: torch.device, quick: bool = False, clock: Clock | None = None) -> Ceilings:
    """The copy of a buffer far larger than any private cache, and a square float32 product; the best of several."""
    large = device.type == "cuda"
    count = (1 << 20) if quick else (1 << 28) if large else (1 << 26)
    side = 256 if quick else 8192 if large else 2048
    source = torch.rand(count, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    out = torch.empty_like(a)
    rounds = 3 if quick else 7
    copied = _best(lambda: target.copy_(source), clock or device_clock(device), rounds)
    multiplied = _best(lambda: torch.mm(a, b, out=out), clock or device_clock(device), rounds)
    return Ceilings(2 * source.nbytes / copied, 2 * side**3 / multiplied)


def floor_seconds(work: Sequence[Work], ceilings: Ceilings) -> tuple[float, str]:
    """Least seconds for parts that follow one another, and what bounds most of them: ``bytes`` or ``FLOPs``."""
    by_bytes = [part.bytes / ceilings.copy for part in work]
    by_flops = [part.flops / ceilings.gemm for part in work]
    total = sum(map(max, by_bytes, by_flops))
    return total, "bytes" if sum(by_bytes) >= sum(by_flops) else "FLOPs"


def _best(call: Callable[[], Any], clock: Clock, rounds: int) -> float:
    call()
    return min(clock(call)[0] for _ in range(rounds))
