"""Speed records made by hand, and the benchmarks on tiny shapes."""

from __future__ import annotations

import tempfile
from functools import cache
from typing import Any

import pytest
import torch

from bench.speed.__main__ import SUBJECTS
from bench.speed.benchmark import Benchmark
from bench.speed.plan import quick_plan


@cache
def quick_benchmarks(subject: str, device: str = "cpu") -> tuple[Benchmark, ...]:
    """The benchmarks of a subject, made once per process.

    Without ``torch.compile``, which takes longer than all other variants, and without the user's cache of trials.
    """
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("BDPRUNE_CACHE", folder)
        patch.setattr("bench.speed.benchmark.can_compile", lambda device: False)
        return tuple(SUBJECTS[subject](quick_plan(torch.device(device))))


def row(variant: str, kind: str, seconds: float | None, **fields: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"variant": variant, "kind": kind, "seconds": seconds, "quartiles": [seconds, seconds]}
    made |= {"repeats": 5, "scale": 1.0, "lower_bound_percent": 12.5, "error": 1e-7, "peak_bytes": 2_000_000}
    return made | {"compile_seconds": None, "note": "", "failure": ""} | fields


def measurement(name: str, case: str, *rows: dict[str, Any], bound: float | None = 1.0) -> dict[str, Any]:
    """One benchmark of a record."""
    made = {"name": name, "case": case, "rows": list(rows), "lower_bound_seconds": bound, "lower_bound_by": "FLOPs"}
    return made | {"error_is": "", "clock": "wall"}


def record(*benchmarks: dict[str, Any], threads: int = 1, device: str = "cpu", **fields: Any) -> dict[str, Any]:
    """A record with one run."""
    machine = {"hardware": "A CPU", "device": device, "commit": "abc", "torch": "2.13", "cuda": None, "cores": 2}
    machine |= {"python": "3.11", "load": 3.2, "build": {"backend": "native", "cpu_features": "avx2"}}
    run = {"threads": threads, "copy_bytes_per_second": 1e10, "gemm_flops_per_second": 1e11, "skipped": []}
    made = {"schema": 2, "started": "2030-01-01", "machine": machine, "quick": False, "clock": "wall"}
    return made | {"runs": [run | {"benchmarks": list(benchmarks)}]} | fields
