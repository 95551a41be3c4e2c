"""The page of benchmarks from a record made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from bench.ladders.__main__ import SUBJECTS
from bench.ladders.plan import quick_plan
from bench.ladders.report import chart, duration, main, page, precision, summary, table, targets, where_time_goes
from bench.ladders.targets import TARGETS, best, whole_rnp


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


def ladder(name: str, case: str, *rows: dict[str, Any], floor: float | None = 1.0) -> dict[str, Any]:
    return {"name": name, "case": case, "rows": list(rows), "floor_seconds": floor, "floor_by": "FLOPs", "error_is": ""}


def measured(*found: dict[str, Any]) -> dict[str, Any]:
    return {"runs": [{"threads": 2, "ladders": list(found)}]}


def lines_of(record: dict[str, Any]) -> list[str]:
    return [line for line in targets(record).splitlines() if line.startswith("| ")][1:]


def test_targets_are_worked_out_from_the_rows() -> None:
    norms = ladder("Spectral norms", "net", row("a", "author", 40.0), row("e", "eager", 30.0), row("b", "bound", 0.5))
    norms["rows"] += [row("o", "ours", 2.0)]
    assert lines_of(measured(norms)) == [
        "| Spectral norms: net | faster than the best eager rung | 2 | at least 10 x | 15 | yes | 30 |",
        "| Spectral norms: net | faster than the author's loop | 2 | at least 50 x | 20 | **no** | 40 |",
        "| Spectral norms: net | time over one reading of the weights | 2 | at most 4 x | 4 | yes | – |",
    ]


def test_each_rival_is_beaten_by_itself_and_a_broken_rung_is_no_success() -> None:
    score = ladder(
        "Suspiciousness score", "net", row("ANP, 2000 iterations", "rival", 90.0), row("CLP, data-free", "rival", 5.0)
    )
    assert lines_of(measured(score)) == []
    score["rows"].append(row("o", "ours", 2.0))
    anp, clp = lines_of(measured(score))
    assert "| 45 | yes | 90 |" in anp
    assert "| 2.5 | **no** | 5 |" in clp
    score["rows"].append(row("NAD, 30 epochs", "rival", None, failure="RuntimeError: no memory"))
    _, nad, *_ = lines_of(measured(score))
    assert "faster than NAD | 2 | at least 3 x | – | **no** |" in nad


def test_an_error_that_is_no_number_misses_its_target() -> None:
    for error, met in (("nan", "**no**"), (1e-6, "yes"), (1e-3, "**no**")):
        found = ladder("Channel moments", "one layer, mean = 30", row("o", "ours", 1.0, error=error))
        (line,) = lines_of(measured(found))
        assert f"| {met} |" in line


def test_a_whole_rnp_needs_all_three_phases() -> None:
    phases = [
        ladder(f"RNP width 8: {name}", "case", row("a", "author", 3.0), row("o", "ours", seconds))
        for name, seconds in (("unlearning", 2.0), ("recovery", 1.5), ("sweep of 19 thresholds", 1.0))
    ]
    assert whole_rnp({"ladders": phases[:2]}) == []
    assert whole_rnp({"ladders": phases}) == [("RNP width 8", 2.0)]


def test_every_target_concerns_a_ladder_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.ladders.ladder.can_compile", lambda device: False)
    plan = replace(quick_plan(torch.device("cpu")), stack=((2, 16, 4), (2, 32, 4), (2, 64, 4)))
    made = [{"name": one.name, "case": one.case} for make in SUBJECTS.values() for one in make(plan)]
    for target in TARGETS:
        assert any(target.concerns(one) for one in made), target


def test_targets_of_a_gpu_are_held_against_a_gpu_alone() -> None:
    rows = [row("loop", "author", 9.0), row("vmap", "eager", 3.0), row("fast", "compile", 2.0), row("o", "ours", 1.5)]
    conv = ladder("Stack of models, masked convolution", "64 x [128, 16, 32, 32], of ResNet-18 width 16", *rows)
    found = measured(conv)
    assert lines_of(found) == []
    (line,) = lines_of(found | {"machine": {"device": "cuda"}})
    assert "| at least 2 x | 1.33 | **no** |" in line
    scores = ladder("Stack of models, data-free scores", "64 x ResNet-18 width 64", row("o", "ours", 0.25))
    (line,) = lines_of(measured(scores) | {"machine": {"device": "cuda"}})
    assert "| at least 200 a second | 256 | yes |" in line
    norms = ladder("Stack of models, spectral norms", "64 x", row("svdvals", "eager", 150.0), row("o", "ours", 2.0))
    floor, svd = lines_of(measured(norms) | {"machine": {"device": "cuda"}})
    assert "| at most 3 x | 2 | yes |" in floor and "| at least 100 x | 75 | **no** |" in svd


def test_the_profile_is_shown_where_there_is_one() -> None:
    assert where_time_goes(record()) == ""
    profiled = record()
    profiled["runs"][0]["profiles"] = [{"phase": "recovery", "seconds": 2.0, "percent": {"convolutions": 90.0}}]
    assert "| recovery | 1 | 2 s | convolutions 90 % |" in where_time_goes(profiled)


@pytest.mark.parametrize(
    ("fields", "met"),
    [
        ({}, "yes"),
        ({"rank_correlation": 0.98}, "**no**"),
        ({"rank_correlation": float("nan")}, "**no**"),
        ({"same_pruned": False}, "**no**"),
    ],
)
def test_masks_must_agree_in_rank_and_in_what_is_pruned(fields: dict[str, Any], met: str) -> None:
    assert precision([]) == ""
    lines = precision([paths(fields)]).splitlines()
    assert lines[-3].startswith("| m | Winograd | 1 | ")
    assert lines[-3].endswith(f" | 0.05 | 0.5 | 7 and 8 | {met} | 90 and 91 | 1 and 2 |")


def test_paths_are_held_against_the_spread_of_the_seeds() -> None:
    *_, line = precision([paths({})]).splitlines()
    assert "mean CA differs by 1.50 points, seeds by up to 3.00; mean ASR differs by 1.00 points" in line
    assert line.endswith("4 times faster than a plain one on these masks.")


def paths(fields: dict[str, Any]) -> dict[str, Any]:
    """A record of two seeds; ``fields`` are of the second."""
    found = {"rank_correlation": 0.995, "largest_difference": 0.05, "threshold": 0.5, "pruned": [7, 8]}
    found |= {"same_pruned": True, "plans": ["Plan(bfloat16=False, channels_last=True, winograd=True)"]}
    first = [{"ca": 92.0, "asr": 0.0}, {"ca": 94.0, "asr": 1.0}]
    second = [{"ca": 90.0, "asr": 1.0}, {"ca": 91.0, "asr": 2.0}]
    seeds = [found | {"seed": 0, "left": first}, found | {"seed": 1, "left": second} | fields]
    return {"model": "m", "precision": "auto", "seeds": seeds, "sweep_seconds": {"plain": 6.0, "ours": 1.5}}
