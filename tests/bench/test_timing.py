"""Clocks, repeats, quartiles and memory of the benchmarks."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.speed.benchmark import Variant
from bench.speed.timing import Sample, cpu_clock, device_clock, measure, peak_bytes, repeats, wall_clock

CPU = torch.device("cpu")


class FakeClock:
    """Reports the seconds of a list, one per call; repeats the last."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = list(seconds)

    def __call__(self, call: Callable[[], Any]) -> tuple[float, Any]:
        output = call()
        return (self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]), output


def test_median_and_quartiles_of_a_scaled_run() -> None:
    sample = Sample(Variant("a", "ours", lambda: None, scale=10.0), seconds=[4.0, 1.0, 2.0, 3.0, 10.0])
    assert sample.median == 30.0
    assert (sample.quartile(1), sample.quartile(3)) == (20.0, 40.0)


def test_a_single_call_is_its_own_quartile_and_no_call_gives_nan() -> None:
    assert Sample(Variant("a", "ours", lambda: None, scale=2.0), seconds=[3.0]).quartile(3) == 6.0
    assert math.isnan(Sample(Variant("a", "ours", lambda: None)).median)


@pytest.mark.parametrize(("share", "call", "count"), [(1.0, 0.1, 10), (1.0, 5.0, 1), (1.0, 1e-6, 25), (0.0, 0.0, 1)])
def test_repeats_fit_the_time(share: float, call: float, count: int) -> None:
    assert repeats(share, call) == count


def test_a_quick_variant_is_timed_after_two_warm_up_calls() -> None:
    (sample,) = measure([Variant("a", "ours", lambda: "out")], FakeClock(0.9, 0.5, 0.2, 0.3), CPU, seconds=1.0, most=9)
    assert sample.first == 0.9
    assert sample.seconds == [0.2, 0.3]  # two calls of about 0.5 s fit into a second
    assert sample.output == "out"


@pytest.mark.parametrize(("seconds", "counted"), [(1.0, [7.0]), (20.0, [7.0, 9.0])])
def test_the_first_call_of_a_slow_variant_counts(seconds: float, counted: list[float]) -> None:
    (sample,) = measure([Variant("a", "ours", lambda: None)], FakeClock(7.0, 9.0), CPU, seconds, most=9)
    assert sample.seconds == counted


def test_compiling_never_counts() -> None:
    (sample,) = measure([Variant("a", "compile", lambda: None)], FakeClock(60.0, 2.0, 3.0), CPU, seconds=4.0, most=9)
    assert sample.first == 60.0
    assert sample.seconds == [2.0, 3.0]


def test_variants_take_turns_and_a_failed_one_does_not_affect_the_others() -> None:
    order: list[str] = []

    def broken() -> None:
        raise ValueError("no such driver\nand more")

    variants = [Variant("a", "eager", lambda: order.append("a")), Variant("b", "eager", broken)]
    variants.append(Variant("c", "ours", lambda: order.append("c")))
    first, failed, last = measure(variants, FakeClock(0.1), CPU, seconds=0.4, most=2)
    assert order == ["a", "a", "c", "c", "a", "c", "a", "c"]
    assert failed.failure == "ValueError: no such driver"
    assert failed.seconds == []
    assert len(first.seconds) == len(last.seconds) == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux reports it")
def test_peak_memory_counts_what_was_freed_within_the_call() -> None:
    def call() -> None:
        torch.ones(8 << 20)  # 32 MB

    peak = peak_bytes(CPU, call)
    if peak is None:
        pytest.skip("/proc/self/clear_refs is not writable")
    assert 30e6 < peak < 60e6


def test_clocks_return_the_output(device: str) -> None:
    where = torch.device(device)
    for clock in (wall_clock(where), device_clock(where)):
        seconds, output = clock(lambda: torch.ones(3, device=where).sum())
        assert output.item() == 3.0
        assert seconds >= 0.0


def test_processor_time_counts_work_and_children_but_not_waits() -> None:
    assert cpu_clock(lambda: time.sleep(0.3))[0] < 0.1
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    seconds, done = cpu_clock(lambda: subprocess.run([sys.executable, "-c", busy], check=True))
    assert done.returncode == 0
    assert 0.3 <= seconds < 1.0
