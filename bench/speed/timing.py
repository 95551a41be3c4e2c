"""Clocks, repeats and memory: measures every variant in the same manner."""

from __future__ import annotations

import ctypes
import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.speed.benchmark import Variant

_FLUSH_BYTES = 256 << 20
_QUICK_CALL = 1.0
_MOST_REPEATS = 25

Clock = Callable[[Callable[[], Any]], tuple[float, Any]]
"""Calls a function; returns the seconds it took and its result."""


def wall_clock(device: torch.device) -> Clock:
    """Wall-clock seconds of the host; waits for the device before and after."""
    finish = torch.cuda.synchronize if device.type == "cuda" else _nothing

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        finish()
        start = time.perf_counter()
        output = call()
        finish()
        return time.perf_counter() - start, output

    return timed


def device_clock(device: torch.device) -> Clock:
    """Seconds between two events on a GPU, whose L2 cache is flushed before; the wall clock on a CPU.

    Weights of 45 MB fit into the L2 cache of a large GPU: without the flush, a repeated call would read the cache.
    CPU caches are not flushed: in a network, the layer before leaves its output there too.
    """
    if device.type != "cuda":
        return wall_clock(device)
    trash = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        trash.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        output = call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, output

    return timed


def cpu_clock(call: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of this process and of its finished children.

    With one thread, this equals the wall time on an idle machine without waits. Load from others distorts it less.
    """
    start = _worked()
    output = call()
    return _worked() - start, output


def _worked() -> float:
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def _nothing() -> None:
    """A CPU finishes its work before it returns."""


def peak_bytes(device: torch.device, call: Callable[[], Any]) -> int | None:
    """Peak growth of memory during ``call``, in bytes; None if the system does not report it.

    On CUDA it counts what the caching allocator handed out; on Linux, the resident memory of this process in pages.
    Memory that a library keeps for later calls counts once, in the first call.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated(device) - before)
    before_kb = _reset_resident_peak()
    call()
    after_kb = _status("VmHWM")
    return None if before_kb is None or after_kb is None else max(after_kb - before_kb, 0) * 1024


def _reset_resident_peak() -> int | None:
    """Resets the resident peak and returns the resident memory in KiB; None without Linux's /proc."""
    # Freed heap that stays mapped would hide the memory that the next call takes.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> int | None:
    """A field of /proc/self/status, in KiB."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    return None


@dataclass
class Sample:
    """The measurements of one variant.

    Attributes:
        first: seconds of its first call, compilation included.
        seconds: of the timed calls.
        peak: bytes, None where unknown.
        output: result of the first call; freed once its error is known.
        failure: why the measurement failed; empty if it worked.
    """

    variant: Variant
    first: float = math.nan
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    output: Any = None
    failure: str = ""

    @property
    def median(self) -> float:
        """Median seconds of one whole run."""
        return statistics.median(self.seconds) * self.variant.scale if self.seconds else math.nan

    def quartile(self, which: int) -> float:
        """First (1) or third (3) quartile of the seconds of one whole run."""
        if len(self.seconds) < 2:
            return self.median
        return statistics.quantiles(self.seconds, n=4, method="inclusive")[which - 1] * self.variant.scale


def measure(variants: Sequence[Variant], clock: Clock, device: torch.device, seconds: float, most: int) -> list[Sample]:
    """Times all variants in turn, so that a busy moment affects all of them.

    The first call of each variant warms up and compiles. A long call needs no warm-up, so its first call counts. Every
    variant gets an equal share of ``seconds``: at least one timed call, at most ``most``.
    """
    samples = [_first(variant, clock, device) for variant in variants]
    alive = [sample for sample in samples if not sample.failure]
    share = seconds / max(len(alive), 1)
    wanted = {id(sample): repeats(share, sample.seconds[-1], most) for sample in alive}
    for sample in alive:
        # A short call may have been a warm-up: it only determines the number of repeats.
        if sample.seconds[-1] < _QUICK_CALL:
            sample.seconds.clear()
    for _ in range(max(wanted.values(), default=0)):
        for sample in alive:
            if len(sample.seconds) < wanted[id(sample)]:
                sample.seconds.append(clock(sample.variant.call)[0])
    return samples


def repeats(share: float, call: float, most: int = _MOST_REPEATS) -> int:
    """Number of calls of ``call`` seconds that fit into ``share`` seconds: at least 1, at most ``most``."""
    return max(1, min(most, int(share / max(call, 1e-9))))


def _first(variant: Variant, clock: Clock, device: torch.device) -> Sample:
    """First call, memory, and an estimate of the time. A variant that fails records the reason; the others go on."""
    sample = Sample(variant)

    def run() -> None:
        seconds, sample.output = clock(variant.call)
        sample.seconds.append(seconds)

    try:
        sample.peak = peak_bytes(device, run)
        sample.first = sample.seconds[0]
        if sample.first < _QUICK_CALL or variant.kind == "compile":
            # Libraries and compilers allocate memory of their own in the first call.
            sample.output = None
            sample.peak = peak_bytes(device, run)
            del sample.seconds[0]
    except Exception as error:  # the table shows it
        sample.failure = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        sample.seconds.clear()
    return sample
