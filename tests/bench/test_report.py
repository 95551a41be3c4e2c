"""The page of benchmarks from a record made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.ladders.report import best, chart, duration, main, page, summary, table


def row(rung: str, kind: str, seconds: float | None, **fields: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"rung": rung, "kind": kind, "seconds": seconds, "quartiles": [seconds, seconds]}
    made |= {"repeats": 5, "scale": 1.0, "floor_percent": 12.5, "error": 1e-7, "peak_bytes": 2_000_000}
    return made | {"compile_seconds": None, "note": "", "failure": ""} | fields


def record() -> dict[str, Any]:
    win = [
        row("loop", "author", 0.5),
        row("one", "eager", 0.03),
        row("two", "eager", 0.02),
        row("three", "eager", None, error=None, failure="RuntimeError: no driver"),
        row("fast", "compile", 0.015, compile_seconds=31.0),
        row("op", "ours", 0.002, error="nan"),
        row("op without half", "ours", 0.001),
    ]
    loss = [row("a | b", "eager", 1e-5), row("op", "ours", 2e-5, peak_bytes=None, error=None)]
    shared = {"error_is": "largest", "floor_seconds": 1e-4, "floor_by": "bytes", "clock": "device"}
    ladders = [{"name": "Norms", "case": "small", "rows": win} | shared]
    ladders.append({"name": "Masks", "case": "large", "rows": loss} | shared)
    run = {"threads": 1, "copy_bytes_per_second": 1e10, "gemm_flops_per_second": 1e11, "ladders": ladders}
    machine = {"hardware": "A <CPU>", "commit": "abc", "torch": "2.13", "cuda": None, "python": "3.11", "cores": 2}
    machine |= {"build": {"backend": "native", "cpu_features": "avx2"}, "load": 3.2}
    runs = [run | {"left_out": ["RNP"]}]
    return {"schema": 1, "started": "2030-01-01", "machine": machine, "quick": False, "runs": runs}


def test_the_best_rung_is_the_fastest_that_worked_and_ours_is_the_first() -> None:
    ladder = record()["runs"][0]["ladders"][0]
    assert best(ladder, "eager")["rung"] == "two"  # type: ignore[index]
    assert best(ladder, "ours")["rung"] == "op"  # type: ignore[index]
    assert best(ladder, "rival") is None


def test_the_summary_says_where_we_lose() -> None:
    win, loss = summary(record()).splitlines()[2:]
    assert win == "| Norms: small | 1 | two, 20 ms | 2 ms | 10.00 | 7.50 | 250.00 | 12.5 % |"
    assert loss == "| Masks: large | 1 | a \\| b, 10 µs | 20 µs | 0.50, **we lose** | – | – | 12.5 % |"


def test_the_table_keeps_every_row() -> None:
    lines = table(record()["runs"][0]["ladders"][0]).splitlines()[2:]
    assert len(lines) == 7
    assert lines[0] == "| loop | author | 500 ms | 500 ms to 500 ms | 250.00 | 12.5 % | 1.0e-07 | 2.0 MB |  |"
    assert lines[2].startswith("| **two** (best eager) | eager |")
    assert "failed: RuntimeError: no driver" in lines[3]
    assert "compiled in 31 s, not counted" in lines[4]
    assert "| nan |" in lines[5]


def test_the_chart_is_one_svg_that_marks_losses() -> None:
    text = chart(record())
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    kinds = [one.get("class") for one in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert kinds == ["bar", "bar marked"]
    assert "<style>" in text


def test_the_page_names_what_was_left_out_and_how_busy_it_was() -> None:
    text = page([("cpu.json", record())], ["cpu.svg"])
    for part in (
        "## A <CPU>",
        "Left out with 1 thread(s)",
        "RNP",
        "3.2 processes",
        "10 GB/s",
        "100 GFLOP/s",
        "(cpu.svg)",
    ):
        assert part in text


def test_files_are_written(tmp_path: Path) -> None:
    source = tmp_path / "ladders-cpu.json"
    source.write_text(json.dumps(record()))
    main([str(source), "--page", str(tmp_path / "docs" / "benchmarks.md")])
    assert sorted(one.name for one in (tmp_path / "docs").iterdir()) == ["benchmarks-ladders-cpu.svg", "benchmarks.md"]
    assert "(benchmarks-ladders-cpu.svg)" in (tmp_path / "docs" / "benchmarks.md").read_text()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2e-6, "2 µs"), (1.2345e-3, "1.23 ms"), (0.5, "500 ms"), (61.0, "61 s"), (600.0, "10 min"), (36000.0, "10 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
