"""Rows of measurements: made once, written at once, and found by their values."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from rows import Rows, auroc

from bdprune.errors import DataError


def test_a_row_is_made_once_and_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, made = tmp_path / "rows.jsonl", []
    for _ in range(2):
        rows = Rows(file, ("model", "seed"), {"device": "cpu"})
        rows.add({"model": "a", "seed": 0}, lambda: {"score": made.append(1) or 2.0, "details": [1, 2]})
    assert len(made) == 1
    (line,) = file.read_text().splitlines()
    row = json.loads(line)
    assert (row["model"], row["score"], row["details"], row["device"]) == ("a", 2.0, [1, 2], "cpu") and "commit" in row
    assert "details" not in capsys.readouterr().err


def test_a_half_line_of_a_killed_run_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    Rows(file, ("model",)).add({"model": "a"}, lambda: {"score": 1.0})
    with file.open("a") as lines:
        lines.write('{"model": "b", "sco')
    again = Rows(file, ("model",))
    again.add({"model": "b"}, lambda: {"score": 2.0})
    assert [json.loads(line)["model"] for line in file.read_text().splitlines()] == ["a", "b"]


def test_rows_are_found_by_their_values() -> None:
    rows = Rows(None, ("model", "seed"))
    for model, seed in (("a", 0), ("b", 0), ("a", 1)):
        rows.add({"model": model, "seed": seed}, lambda: {})
    assert [(row["model"], row["seed"]) for row in rows.where(model="a")] == [("a", 0), ("a", 1)]


def test_auroc_counts_ties_half() -> None:
    assert auroc([2.0, 1.0], [1.0, 0.0]) == (1 + 1 + 0.5 + 1) / 4


def test_a_row_that_fails_is_tried_again(tmp_path: Path) -> None:
    def fail() -> dict[str, float]:
        raise DataError("There are no images.", "Give some.")

    rows = Rows(tmp_path / "rows.jsonl", ("model",))
    rows.add({"model": "a"}, fail)
    rows.add({"model": "b"}, lambda: {"score": 1.0})
    assert [key["model"] for key, _ in rows.failed] == ["a"] and [row["model"] for row in rows.where()] == ["b"]
    again = Rows(tmp_path / "rows.jsonl", ("model",))
    again.add({"model": "a"}, lambda: {"score": 2.0})
    assert {row["model"] for row in again.where()} == {"a", "b"} and not again.failed
