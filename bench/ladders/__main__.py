"""Measures the ladders and writes them as JSON.

    python -m bench.ladders [--device cpu] [--threads 1 2] [--only NAME] [--minutes 14] [--rnp-images N] [--quick]
                            --out FILE

Precision is the same on every rung: float32 in and out, no TF32, no half precision; the error column is against
float64. What takes long for one row (compiling, other methods) runs with the last number of threads
only. The record is written after every ladder. A ladder whose turn comes after the minutes are over is listed as
left out.
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

from bench.ladders import (
    channel_moments,
    filter_spectral_norms,
    loading,
    machine,
    masked_conv2d,
    record,
    rnp,
    stack,
    startup,
    suspiciousness,
    winograd_conv2d,
)
from bench.ladders.floors import Ceilings, measure_ceilings
from bench.ladders.ladder import Ladder
from bench.ladders.plan import Plan, cpu_plan, cuda_plan, quick_plan
from bench.ladders.profile import profiles
from bench.ladders.timing import Clock, cpu_clock, device_clock, measure, wall_clock

SUBJECTS: dict[str, Callable[[Plan], list[Ladder]]] = {
    "stack": stack.ladders,
    "spectral": filter_spectral_norms.ladders,
    "moments": channel_moments.ladders,
    "masked_conv": masked_conv2d.ladders,
    "winograd": winograd_conv2d.ladders,
    "loading": loading.ladders,
    "startup": startup.ladders,
    "suspiciousness": suspiciousness.ladders,
    "rnp": rnp.ladders,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs what is asked for."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    if options.clock == "cpu" and (device.type != "cpu" or options.threads != [1]):
        sys.exit("Processor time says how long a call takes on the CPU with `--threads 1` only.")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("No CUDA device is here; `--device cpu` measures the CPU.")
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
    # On a GPU the host's threads only launch kernels.
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
    """The part of the time that is left for the first of these numbers of threads: work takes one over them."""
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
    """All ladders with one number of threads, appended to ``done`` and written ladder by ladder.

    ``clock`` stands in for each ladder's own.
    """
    ceilings = measure_ceilings(plan.device, plan.quick, clock)
    part: dict[str, Any] = {
        "threads": threads,
        "copy_bytes_per_second": record.number(ceilings.copy),
        "gemm_flops_per_second": record.number(ceilings.gemm),
        "ladders": [],
        "left_out": [],
    }
    done["runs"].append(part)
    for subject in subjects:
        for ladder in _drained(SUBJECTS[subject](plan)):
            if time.monotonic() > end:
                part["left_out"].append(f"{ladder.name} ({ladder.case})")
            else:
                part["ladders"].append(measured(_fitting(ladder, plan), plan, ceilings, clock))
            record.write(out, done)
    if plan.complete and "rnp" in subjects and time.monotonic() < end:
        part["profiles"] = [one for width, images, _ in plan.rnp for one in profiles(width, images, plan.device)]
    part["load_after"] = machine.load()
    record.write(out, done)


def measured(ladder: Ladder, plan: Plan, ceilings: Ceilings, clock: Clock | None) -> dict[str, Any]:
    """Times one ladder; what it compiled is forgotten."""
    start = time.monotonic()
    clock = clock or (wall_clock(plan.device) if ladder.host else device_clock(plan.device))
    samples = measure(ladder.rungs, clock, plan.device, ladder.seconds, plan.most)
    found = record.ladder_record(ladder, samples, ceilings)
    found["took_seconds"] = round(time.monotonic() - start, 1)
    if any(rung.kind == "compile" for rung in ladder.rungs):
        torch.compiler.reset()
    gc.collect()
    _say(found)
    return found


def _drained(ladders: list[Ladder]) -> Iterator[Ladder]:
    """The ladders one by one, each let go of before the next: their data is large."""
    while ladders:
        yield ladders.pop(0)


def _fitting(ladder: Ladder, plan: Plan) -> Ladder:
    """Without what takes minutes for one row, unless the plan is complete."""
    slow = () if plan.complete else ("compile", "rival")
    return replace(ladder, rungs=tuple(rung for rung in ladder.rungs if rung.kind not in slow))


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
        print(f"  {row['kind']:8}{row['rung'][:52]:54}{seconds:>16}  {error} {row['failure']}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu counts processor time, ceilings too: for one thread on a machine that others use",
    )
    parser.add_argument("--only", action="append", choices=list(SUBJECTS), help="repeatable (default: all)")
    parser.add_argument(
        "--rnp-images", type=int, help="images of RNP's timed steps: 125 make a step as large as those of a real run"
    )
    parser.add_argument("--minutes", type=float, default=14.0, help="no ladder is begun after so long")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, to see that it works; the figures mean nothing"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file that is written")
    return parser


if __name__ == "__main__":
    main()
