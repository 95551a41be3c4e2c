"""The lower bound of a time, from the peak copy and multiply rates of this machine, measured in the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.speed.benchmark import Work
from bench.speed.timing import Clock, device_clock


@dataclass(frozen=True)
class PeakRates:
    """The best rates that were measured.

    Attributes:
        copy: bytes per second of a copy; counts bytes read and bytes written.
        gemm: floating point operations per second of a float32 matrix product without TF32.
    """

    copy: float
    gemm: float


def measure_peak_rates(device: torch.device, quick: bool = False, clock: Clock | None = None) -> PeakRates:
    """The best of several copies of a buffer larger than any private cache, and of several square float32 products."""
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
    return PeakRates(2 * source.nbytes / copied, 2 * side**3 / multiplied)


def lower_bound_seconds(work: Sequence[Work], rates: PeakRates) -> tuple[float, str]:
    """Least seconds for parts that run one after another, and what limits most of them: ``bytes`` or ``FLOPs``."""
    by_bytes = [part.bytes / rates.copy for part in work]
    by_flops = [part.flops / rates.gemm for part in work]
    total = sum(map(max, by_bytes, by_flops))
    return total, "bytes" if sum(by_bytes) >= sum(by_flops) else "FLOPs"


def _best(call: Callable[[], Any], clock: Clock, rounds: int) -> float:
    call()
    return min(clock(call)[0] for _ in range(rounds))
