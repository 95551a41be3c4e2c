"""Turns samples into JSON records."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.speed.benchmark import Benchmark
from bench.speed.lower_bound import PeakRates, lower_bound_seconds
from bench.speed.timing import Sample

SCHEMA = 2
Record = dict[str, Any]


def benchmark_record(benchmark: Benchmark, samples: Sequence[Sample], rates: PeakRates) -> Record:
    """The benchmark, its lower bound and its rows: seconds of whole runs, bytes, percentages."""
    bound, limited_by = _lower_bound(benchmark, samples, rates)
    return {
        "name": benchmark.name,
        "case": benchmark.case,
        "error_is": benchmark.error_name,
        "clock": "wall" if benchmark.host else "device",
        "lower_bound_seconds": number(bound),
        "lower_bound_by": limited_by,
        "rows": [row(benchmark, sample, bound) for sample in samples],
    }


def row(benchmark: Benchmark, sample: Sample, bound: float) -> Record:
    """One variant. The error is computed here, so that the float64 computation adds no time or memory to a sample."""
    variant, error = sample.variant, None
    if (
        benchmark.error is not None
        and variant.exact
        and variant.kind not in ("required", "alternative")
        and not sample.failure
    ):
        error = benchmark.error(sample.output)
    peak = benchmark.peak(sample.output) if benchmark.peak and sample.output is not None else sample.peak
    sample.output = None
    return {
        "variant": variant.name,
        "kind": variant.kind,
        "seconds": number(sample.median),
        "quartiles": [number(sample.quartile(1)), number(sample.quartile(3))],
        "repeats": len(sample.seconds),
        "scale": variant.scale,
        "lower_bound_percent": number(100 * bound / sample.median) if sample.seconds else None,
        # NaN is stored as text: a variant that returns NaN must not look like one without an error.
        "error": "nan" if error is not None and math.isnan(error) else error,
        "peak_bytes": peak,
        "compile_seconds": number(sample.first - sample.median / variant.scale) if variant.kind == "compile" else None,
        "note": variant.note,
        "failure": sample.failure,
    }


def number(value: float) -> float | None:
    """``value`` with five digits; None if it is not finite, because JSON has no such numbers."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def write(path: Path, record: Record) -> None:
    """Replaces the file in one step, so that a killed run leaves the last complete record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


def _lower_bound(benchmark: Benchmark, samples: Sequence[Sample], rates: PeakRates) -> tuple[float, str]:
    if benchmark.lower_bound_variant is None:
        return lower_bound_seconds(benchmark.work, rates)
    medians = [sample.median for sample in samples if sample.variant.name == benchmark.lower_bound_variant]
    return medians[0], benchmark.lower_bound_variant
