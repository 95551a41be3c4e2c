"""The page about speed: from records made by hand, and the committed one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.speed import report
from bench.speed.chart import chart
from bench.speed.masks import masks_section
from bench.speed.page import Records, page, pictures
from bench.speed.results import measurements, newest
from bench.speed.rule import rule_section
from bench.speed.tables import duration, span, table

from .helpers import measurement, record, row

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 250
SVG = "{http://www.w3.org/2000/svg}"


def small() -> dict[str, Any]:
    """A record in which ours wins two cases of one benchmark and loses another benchmark."""
    win = [
        row("loop", "author", 0.5),
        row("one", "eager", 0.03),
        row("two", "eager", 0.02),
        row("three", "eager", None, error=None, failure="RuntimeError: no driver"),
        row("fast", "compile", 0.015),
        row("op", "ours", 0.002),
        row("op without half", "ours", 0.001),
    ]
    more = [row("loop", "author", 0.5), row("one", "eager", 0.03), row("op", "ours", 0.001)]
    loss = [row("a | b", "eager", 1e-5), row("op", "ours", 2e-5)]
    return record(
        measurement("Norms", "small", *win, bound=1e-3),
        measurement("Norms", "large", *more, bound=1e-3),
        measurement("Masks", "large, TF32 in every variant", *loss, bound=None),
    )


def section(text: str, heading: str) -> list[str]:
    """The lines of the page below a heading that are rows of a table, without its head."""
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [line for line in part.splitlines() if line.startswith("| ")][1:]


def of(*made: dict[str, Any]) -> Records:
    return Records({f"speed-{index}.json": one for index, one in enumerate(made)}, {}, {})


def test_the_table_of_a_machine_has_one_line_per_benchmark() -> None:
    norms, masks = section(page(of(small())), "A CPU with AVX2")
    assert norms == "| Norms | 2 | 1 ms to 2 ms | 7.50 to 30.00 | 250.00 to 500.00 | 1.00 to 2.00 |"
    assert masks == "| Masks, TF32 | 1 | 20 µs | **0.50** | – | – |"


def test_more_threads_add_a_column() -> None:
    made = small()
    made["runs"].append(made["runs"][0] | {"threads": 2, "benchmarks": [made["runs"][0]["benchmarks"][1]]})
    text = page(of(made))
    assert "| PyTorch, 2 threads |" in text and "2 cores, 1 thread," in text
    assert [line.split("|")[-2].strip() for line in section(text, "A CPU with AVX2")] == ["30.00", "–"]


def test_the_newest_run_of_a_case_counts_and_slower_cases_of_all_runs_are_listed() -> None:
    old = small()
    new = record(measurement("Masks", "large, TF32 in every variant", row("a", "eager", 3.0), row("op", "ours", 1.0)))
    new["started"] = "2030-01-02"
    text = page(of(new, old))
    assert "| Masks, TF32 | 1 | 1 s | 3.00 | – | 1.00 |" in section(text, "A CPU with AVX2")
    line = "| Masks: large, TF32 in every variant | `speed-1.json` | 1 | 20 µs | a \\| b, 10 µs | 0.50 |"
    assert section(text, "Where ours is slower") == [line]
    both = [*measurements("old", old), *measurements("new", new)]
    assert {one.name: one.source for one in newest(both)} == {"Norms": "old", "Masks": "new"}


def test_failed_variants_are_listed() -> None:
    made = small()
    assert "\n* `speed-0.json`, Norms, small, three: RuntimeError: no driver\n" in page(of(made))
    for one in made["runs"][0]["benchmarks"]:
        one["rows"] = [row("op", "ours", None, failure="ValueError: no op")]
    text = page(of(made))
    assert text.count("ValueError: no op") == 3 and "| Norms |" not in text


def test_an_alternative_method_can_be_faster() -> None:
    score = measurement("Score", "net", row("CLP", "alternative", 0.2), row("e", "eager", 9.0), row("o", "ours", 2.0))
    (line,) = section(page(of(record(score))), "Where ours is slower")
    assert line.endswith("| 2 s | CLP, 200 ms | 0.10 |")


def test_the_page_names_skipped_benchmarks_rates_load_and_profiles() -> None:
    made = small()
    made["runs"][0] |= {
        "skipped": ["RNP (wide)", "RNP (deep)"],
        "profiles": [{"phase": "recovery", "seconds": 2.0, "percent": {"convolutions, forward": 90.0, "other": 10.0}}],
    }
    text = page(of(made))
    assert "RNP (2)" in text and "10 GB/s" in text and "100 GFLOP/s" in text and "90 to 90 %" in text
    assert section(text, "Records") == ["| `speed-0.json` | speed: Norms, Masks | avx2 | abc | 3.2 | wall |"]


def test_a_gpu_is_named_by_its_hardware_and_a_quick_run_is_marked() -> None:
    made = small() | {"quick": True}
    made["machine"] |= {"device": "cuda", "hardware": "A GPU", "cuda": "13.0"}
    text = page(of(made))
    assert "## A GPU\n" in text and "CUDA 13.0" in text and "the figures mean nothing" in text
    assert list(pictures(of(made))) == ["speed-a-gpu.svg"]


def test_the_chart_is_an_svg_that_marks_slower_cases() -> None:
    root = ElementTree.fromstring(chart("a < b", {"Norms": [("x", 8.0), ("y", 0.5)], "Masks": [("z", 1.0)]}))
    bars = [one for one in root.iter(f"{SVG}rect") if one.get("class")]
    assert [one.get("class") for one in bars] == ["bar", "bar slower", "bar"]
    wide, slow, even = (float(one.get("width") or "") for one in bars)
    assert wide == pytest.approx(3 * slow, abs=0.3) and even == 0
    texts = [one.text for one in root.iter(f"{SVG}text")]
    assert texts[0] == "a < b" and {"1 ×", "2 ×", "8 ×", "0.50 ×"} <= set(texts)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2e-6, "2 µs"), (1.2345e-3, "1.23 ms"), (0.5, "500 ms"), (61.0, "61 s"), (600.0, "10 min"), (36000.0, "10 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_spans_and_tables() -> None:
    assert [span(values, "{:.1f}".format) for values in ([], [1.0], [2.0, 1.01], [1.0, 1.01])] == [
        "–",
        "1.0",
        "1.0 to 2.0",
        "1.0",
    ]
    assert table(["a", "b"], [["1", "x|y"]]) == "| a | b |\n|---|---|\n| 1 | x\\|y |\n"


def paths(fields: dict[str, Any]) -> dict[str, Any]:
    """A record of ``bench.precision`` with two seeds; ``fields`` belong to the second."""
    found = {"rank_correlation": 0.995, "largest_difference": 0.05, "threshold": 0.5, "pruned": [7, 8]}
    found |= {"same_pruned": True, "plans": ["Plan(bfloat16=False, channels_last=True, winograd=True)"]}
    first = [{"ca": 92.0, "asr": 0.0}, {"ca": 94.0, "asr": 1.0}]
    second = [{"ca": 90.0, "asr": 1.0}, {"ca": 91.0, "asr": 3.0}]
    seeds = [found | {"seed": 0, "left": first}, found | {"seed": 1, "left": second} | fields]
    return {"model": "m", "precision": "auto", "seeds": seeds, "sweep_seconds": {"plain": 6.0, "ours": 1.5}}


@pytest.mark.parametrize(
    ("fields", "result"),
    [
        ({}, "2 of 2 seeds"),
        ({"rank_correlation": 0.98}, "**1 of 2 seeds**"),
        ({"rank_correlation": float("nan")}, "**1 of 2 seeds**"),
        ({"same_pruned": False}, "**1 of 2 seeds**"),
    ],
)
def test_masks_pass_if_they_agree_in_rank_and_in_pruned_filters(fields: dict[str, Any], result: str) -> None:
    assert masks_section({}) == ""
    line = masks_section({"p.json": paths(fields)}).splitlines()[-1]
    assert line.startswith(f"| `p.json` | m | Winograd | {result} | ")
    assert line.endswith(" | 0.05 | 7 and 8, 7 and 8 | 2.00 | 2.00 | 4.00 |")


def test_the_cost_of_the_rule_is_relative_to_the_faster_algorithm() -> None:
    one = {"shape": [1, 16, 8, 8], "outputs": 16, "gradients": False, "direct": 4.0, "winograd": 1.0, "rule": False}
    assert rule_section({}) == ""
    text = rule_section({"r.json": {"outcomes": [one, one | {"rule": True}]}})
    assert text.splitlines()[-1] == "| `r.json` | 2.00 | 4.00 | 4.00 | 1.00 |"


def test_the_command_writes_checks_and_removes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    options = ["--results", str(results), "--docs", str(docs)]
    with pytest.raises(SystemExit, match=r"run `python -m bench\.speed`"):
        report.main(options)
    (results / "speed-cpu.json").write_text(json.dumps(small()))
    assert report.main([*options, "--check"]) == 1 and not docs.exists()
    assert "speed.md is out of date" in capsys.readouterr().err
    assert report.main(options) == 0 and report.main([*options, "--check"]) == 0
    old = docs / "images" / "speed-old.svg"
    old.write_text("")
    assert report.main([*options, "--check"]) == 1
    assert report.main(options) == 0 and not old.exists()
    assert (docs / "evaluation" / "speed.md").exists()


def test_the_committed_page_is_up_to_date_and_short() -> None:
    records = report.read(ROOT / "bench" / "results")
    assert report.outdated(records, ROOT / "docs") == []
    lines = page(records).splitlines()
    assert len(records.speed) >= 6 and 100 < len(lines) <= MOST_LINES


def test_headings_of_the_committed_page_are_unique_and_name_each_machine_once() -> None:
    text = (ROOT / "docs" / "evaluation" / "speed.md").read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    assert len(headings) == len(set(headings))
    machines = [one for one in headings if "AVX" in one or "NVIDIA" in one]
    assert machines and all(text.count(f"# {one}\n") == 1 for one in machines)
    pictured = re.findall(r"\]\((.*?\.svg)\)", text)
    assert len(pictured) == len(machines)
    assert all((ROOT / "docs" / "evaluation" / one).exists() for one in pictured)
