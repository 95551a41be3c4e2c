"""Clocks, repeats and memory: how one rung is measured, the same for all."""

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

from bench.ladders.ladder import Rung

_FLUSH_BYTES = 256 << 20
_QUICK_CALL = 1.0
_MOST_REPEATS = 25

Clock = Callable[[Callable[[], Any]], tuple[float, Any]]
"""Calls something and gives the seconds it took, and what it gave."""


def wall_clock(device: torch.device) -> Clock:
    """Seconds of the host, with the device's work finished before and after."""
    finish = torch.cuda.synchronize if device.type == "cuda" else _nothing

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        finish()
        start = time.perf_counter()
        output = call()
        finish()
        return time.perf_counter() - start, output

    return timed


def device_clock(device: torch.device) -> Clock:
    """Seconds between two events on the device, its L2 cache emptied before; on a CPU the wall clock.

    Weights of 45 MB stay in the L2 cache of a large GPU: without the flush a repeated call would be timed from cache.
    A CPU's caches are left as they are, as after the layer that came before.
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
    """Seconds that processors worked for this process and for its children that ended.

    With one thread that is what a quiet machine's wall clock says, but for waiting; a busy machine stretches it less.
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
    """By how much memory grows at most during ``call``, in bytes; None where the system does not tell.

    On CUDA what the caching allocator handed out, on Linux the resident memory of this process, down to pages. What is
    freed within the call but kept by a library for later counts once, at the first call.
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
    """Starts the resident peak anew; gives what is resident now in KiB, None where Linux's /proc is not there."""
    # Freed heap that stays mapped would hide what the next call takes.
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
    """What was seen of one rung.

    Attributes:
        first: seconds of its first call, compilation included.
        seconds: of the timed calls.
        peak: bytes, None where unknown.
        output: what the first call gave; freed once its error is known.
        failure: why it could not be measured, empty when it could.
    """

    rung: Rung
    first: float = math.nan
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    output: Any = None
    failure: str = ""

    @property
    def median(self) -> float:
        """Median seconds of one whole run."""
        return statistics.median(self.seconds) * self.rung.scale if self.seconds else math.nan

    def quartile(self, which: int) -> float:
        """First (1) or third (3) quartile of the seconds of one whole run."""
        if len(self.seconds) < 2:
            return self.median
        return statistics.quantiles(self.seconds, n=4, method="inclusive")[which - 1] * self.rung.scale


def measure(rungs: Sequence[Rung], clock: Clock, device: torch.device, seconds: float, most: int) -> list[Sample]:
    """Times all rungs in turns, so that a busy moment hurts them alike.

    The first call of each warms up (and compiles); a long one needs no warming up, so its first call counts. Every rung
    gets an equal share of ``seconds``: at least one call that counts, at most ``most``.
    """
    samples = [_first(rung, clock, device) for rung in rungs]
    alive = [sample for sample in samples if not sample.failure]
    share = seconds / max(len(alive), 1)
    wanted = {id(sample): repeats(share, sample.seconds[-1], most) for sample in alive}
    for sample in alive:
        # A short call may still have been warming up: it only says how many to do.
        if sample.seconds[-1] < _QUICK_CALL:
            sample.seconds.clear()
    for _ in range(max(wanted.values(), default=0)):
        for sample in alive:
            if len(sample.seconds) < wanted[id(sample)]:
                sample.seconds.append(clock(sample.rung.call)[0])
    return samples


def repeats(share: float, call: float, most: int = _MOST_REPEATS) -> int:
    """How many calls of ``call`` seconds fit into ``share`` seconds: one at least, ``most`` at most."""
    return max(1, min(most, int(share / max(call, 1e-9))))


def _first(rung: Rung, clock: Clock, device: torch.device) -> Sample:
    """First call, memory, and an estimate of the time; a rung that breaks down says why and spoils no other."""
    sample = Sample(rung)

    def run() -> None:
        seconds, sample.output = clock(rung.call)
        sample.seconds.append(seconds)

    try:
        sample.peak = peak_bytes(device, run)
        sample.first = sample.seconds[0]
        if sample.first < _QUICK_CALL or rung.kind == "compile":
            # Libraries and compilers take memory of their own the first time.
            sample.output = None
            sample.peak = peak_bytes(device, run)
            del sample.seconds[0]
    except Exception as error:  # the table shows it
        sample.failure = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        sample.seconds.clear()
    return sample
