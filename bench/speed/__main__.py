"""Runs the benchmarks and writes a JSON record.

    python -m bench.speed [--device cpu] [--threads 1 2] [--only NAME] [--minutes 14] [--rnp-images N] [--quick]
                          --out FILE

Every variant computes in the same precision: float32 in and out, no TF32, no half precision. Errors are relative to
float64. The slow rows (``torch.compile`` and alternative methods) run with the last number of threads only. The record
is written after every benchmark. Benchmarks that do not start within the minutes are listed as skipped.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.speed import (
    channel_moments,
    filter_spectral_norms,
    inversion,
    loading,
    machine,
    masked_conv2d,
    record,
    rnp,
    stack,
    stamp,
    startup,
    suspiciousness,
    winograd_conv2d,
)
from bench.speed.benchmark import Benchmark
from bench.speed.lower_bound import PeakRates, measure_peak_rates
from bench.speed.plan import Plan, cpu_plan, cuda_plan, quick_plan
from bench.speed.profile import profiles
from bench.speed.timing import Clock, cpu_clock, device_clock, measure, wall_clock

SUBJECTS: dict[str, Callable[[Plan], list[Benchmark]]] = {
    "stack": stack.benchmarks,
    "spectral": filter_spectral_norms.benchmarks,
    "moments": channel_moments.benchmarks,
    "masked_conv": masked_conv2d.benchmarks,
    "winograd": winograd_conv2d.benchmarks,
    "stamp": stamp.benchmarks,
    "inversion": inversion.benchmarks,
    "loading": loading.benchmarks,
    "startup": startup.benchmarks,
    "suspiciousness": suspiciousness.benchmarks,
    "rnp": rnp.benchmarks,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs the chosen benchmarks with each number of threads."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    if options.clock == "cpu" and (device.type != "cpu" or options.threads != [1]):
        sys.exit("`--clock cpu` needs the CPU and one thread; add `--device cpu --threads 1`.")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch found no CUDA device; use `--device cpu` to measure the CPU.")
    _same_precision()
    done: dict[str, Any] = {
        "schema": record.SCHEMA,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(device),
        "quick": options.quick,
        "clock": options.clock,
        "runs": [],
    }
    end = time.monotonic() + 60 * options.minutes
    # On a GPU, the host's threads only launch kernels.
    counts = options.threads if device.type == "cpu" else options.threads[:1]
    for index, threads in enumerate(counts):
        torch.set_num_threads(threads)
        now = time.monotonic()
        until = now + (end - now) * share(counts[index:])
        plan = _plan(device, threads, options.quick, complete=index == len(counts) - 1)
        if options.rnp_images:
            plan = replace(plan, rnp=tuple((width, options.rnp_images, swept) for width, _, swept in plan.rnp))
        clock = cpu_clock if options.clock == "cpu" else None
        run(plan, options.only or list(SUBJECTS), threads, until, done, options.out, clock)


def share(threads: Sequence[int]) -> float:
    """Share of the remaining time for the first number of threads: n threads need 1/n of the time."""
    return (1 / threads[0]) / sum(1 / count for count in threads)


def run(
    plan: Plan,
    subjects: list[str],
    threads: int,
    end: float,
    done: dict[str, Any],
    out: Path,
    clock: Clock | None = None,
) -> None:
    """Runs all benchmarks with one number of threads; appends each to ``done`` and writes the record.

    ``clock`` replaces the clock of every benchmark.
    """
    rates = measure_peak_rates(plan.device, plan.quick, clock)
    part: dict[str, Any] = {
        "threads": threads,
        "copy_bytes_per_second": record.number(rates.copy),
        "gemm_flops_per_second": record.number(rates.gemm),
        "benchmarks": [],
        "skipped": [],
    }
    done["runs"].append(part)
    for subject in subjects:
        for benchmark in _drained(SUBJECTS[subject](plan)):
            if time.monotonic() > end:
                part["skipped"].append(f"{benchmark.name} ({benchmark.case})")
            else:
                part["benchmarks"].append(measured(_fitting(benchmark, plan), plan, rates, clock))
            record.write(out, done)
    if plan.complete and "rnp" in subjects and time.monotonic() < end:
        part["profiles"] = [one for width, images, _ in plan.rnp for one in profiles(width, images, plan.device)]
    part["load_after"] = machine.load()
    record.write(out, done)


def measured(benchmark: Benchmark, plan: Plan, rates: PeakRates, clock: Clock | None) -> dict[str, Any]:
    """Times one benchmark, then drops what it compiled."""
    start = time.monotonic()
    clock = clock or (wall_clock(plan.device) if benchmark.host else device_clock(plan.device))
    samples = measure(benchmark.variants, clock, plan.device, benchmark.seconds, plan.most)
    found = record.benchmark_record(benchmark, samples, rates)
    found["took_seconds"] = round(time.monotonic() - start, 1)
    if any(variant.kind == "compile" for variant in benchmark.variants):
        torch.compiler.reset()
    gc.collect()
    _say(found)
    return found


def _drained(benchmarks: list[Benchmark]) -> Iterator[Benchmark]:
    """Yields the benchmarks one by one and frees each before the next, because their data is large."""
    while benchmarks:
        yield benchmarks.pop(0)


def _fitting(benchmark: Benchmark, plan: Plan) -> Benchmark:
    """The benchmark without its slow rows, unless the plan is complete."""
    slow = () if plan.complete else ("compile", "alternative")
    return replace(benchmark, variants=tuple(variant for variant in benchmark.variants if variant.kind not in slow))


def _same_precision() -> None:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True


def _plan(device: torch.device, threads: int, quick: bool, complete: bool) -> Plan:
    if quick:
        return quick_plan(device)
    return cpu_plan(threads, complete) if device.type == "cpu" else cuda_plan()


def _say(found: dict[str, Any]) -> None:
    print(f"{found['name']}, {found['case']} ({found['took_seconds']} s)", file=sys.stderr)
    for row in found["rows"]:
        seconds = "failed" if row["seconds"] is None else f"{1e3 * row['seconds']:.3f} ms"
        error = "" if row["error"] is None else f"error {float(row['error']):.1e}"
        print(f"  {row['kind']:8}{row['variant'][:52]:54}{seconds:>16}  {error} {row['failure']}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu counts processor time, for one thread on a busy machine",
    )
    parser.add_argument("--only", action="append", choices=list(SUBJECTS), help="repeatable (default: all)")
    parser.add_argument(
        "--rnp-images", type=int, help="images in RNP's timed steps; 125 make a step as large as in a real run"
    )
    parser.add_argument("--minutes", type=float, default=14.0, help="start no benchmark after this time")
    parser.add_argument("--quick", action="store_true", help="tiny shapes that only check that everything runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    return parser


if __name__ == "__main__":
    main()
