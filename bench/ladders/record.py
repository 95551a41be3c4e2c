"""From samples to the record that is kept: one JSON file a device."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.ladders.floors import Ceilings, floor_seconds
from bench.ladders.ladder import Ladder
from bench.ladders.timing import Sample

SCHEMA = 1
Record = dict[str, Any]


def ladder_record(ladder: Ladder, samples: Sequence[Sample], ceilings: Ceilings) -> Record:
    """Floor, ladder and rows, as plain numbers; seconds of whole runs, bytes, shares in per cent."""
    floor, bound = _floor(ladder, samples, ceilings)
    return {
        "name": ladder.name,
        "case": ladder.case,
        "error_is": ladder.error_name,
        "clock": "wall" if ladder.host else "device",
        "floor_seconds": number(floor),
        "floor_by": bound,
        "rows": [row(ladder, sample, floor) for sample in samples],
    }


def row(ladder: Ladder, sample: Sample, floor: float) -> Record:
    """One rung; the error is worked out here, so that its float64 truth is no part of any time or memory."""
    rung, error = sample.rung, None
    if ladder.error is not None and rung.exact and rung.kind not in ("bound", "rival") and not sample.failure:
        error = ladder.error(sample.output)
    peak = ladder.peak(sample.output) if ladder.peak and sample.output is not None else sample.peak
    sample.output = None
    return {
        "rung": rung.name,
        "kind": rung.kind,
        "seconds": number(sample.median),
        "quartiles": [number(sample.quartile(1)), number(sample.quartile(3))],
        "repeats": len(sample.seconds),
        "scale": rung.scale,
        "floor_percent": number(100 * floor / sample.median) if sample.seconds else None,
        # NaN is kept as text: a rung that gives no number must not look like one without an error.
        "error": "nan" if error is not None and math.isnan(error) else error,
        "peak_bytes": peak,
        "compile_seconds": number(sample.first - sample.median / rung.scale) if rung.kind == "compile" else None,
        "note": rung.note,
        "failure": sample.failure,
    }


def number(value: float) -> float | None:
    """``value`` with five digits, None for what is not finite: JSON has no such numbers."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def write(path: Path, record: Record) -> None:
    """Replaces the file at once, so that a killed run leaves the last whole state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    os.replace(beside, path)


def _floor(ladder: Ladder, samples: Sequence[Sample], ceilings: Ceilings) -> tuple[float, str]:
    if ladder.floor_rung is None:
        return floor_seconds(ladder.work, ceilings)
    medians = [sample.median for sample in samples if sample.rung.name == ladder.floor_rung]
    return medians[0], ladder.floor_rung
