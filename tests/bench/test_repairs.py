"""Rows and tables of repairs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bdprune.data import CleanData, RawImages
from bdprune.methods import hold_out
from bdprune.testing.planted import planted

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
from repairs import defence_rate, make_method, parse_method, repair_row, repair_table, retuned, summary_table

BEFORE = {"m": {"model": "m", "ca": 90.0, "asr": 100.0}, "c": {"model": "c", "ca": 80.0, "asr": None}}


def _row(**fields: Any) -> dict[str, Any]:
    row = {
        "model": "m",
        "kind": "badnets",
        "truth": 3,
        "method": "rnp",
        "pruned": 7,
        "change": "pruned",
        "seconds": 4.0,
    }
    return row | {"after": {"ca": 88.0, "asr": 2.0, "ra": 85.0}, "outcome": "repaired", "retuned": 50.0} | fields


def test_methods_have_a_name_a_preset_and_a_number_of_images() -> None:
    assert parse_method("rnp") == ("rnp", None, 500)
    assert parse_method("rnp:paper") == ("rnp", "paper", 500)
    assert parse_method("suspiciousness-10") == ("suspiciousness", None, 10)
    assert make_method("rnp:paper", 3).params["seed"] == 3
    with pytest.raises(ValueError, match="There is no purifier 'magic'"):
        parse_method("magic-10")


def test_the_defence_rate_counts_half_of_both_falls() -> None:
    assert defence_rate(BEFORE["m"], {"ca": 88.0, "asr": 0.0}) == 99.0
    assert defence_rate(BEFORE["m"], {"ca": 95.0, "asr": 100.0}) == 50.0


def test_the_table_has_means_and_worst_over_the_seeds() -> None:
    lines = repair_table([_row(), _row(after={"ca": 86.0, "asr": 6.0, "ra": 83.0}, pruned=9)], BEFORE).splitlines()
    assert lines[2] == (
        "| m | 100.0 | 4.0 (6.0) | 90.0 | 87.0 (86.0) | 84.0 | 96.5 | pruned, 7 to 9 filters | repaired | 50.0 | 4 "
        "| 0.20 / 92.22, 41 filters |"
    )
    assert lines[-1].startswith("1 backdoored models: ASR 4.00 on average and 4.00 at worst; CA falls by 3.00 points")


def test_clean_models_have_their_own_line() -> None:
    row = _row(model="c", kind=None, truth=None, after={"ca": 79.5, "asr": None, "ra": None}, retuned=None, pruned=0)
    text = repair_table([row | {"change": "nothing"}], BEFORE)
    assert "| c | – | – | 80.0 | 79.5 (79.5) | – | – | nothing |" in text
    assert text.endswith("1 clean models: CA falls by at most 0.50 points.")


def test_the_summary_names_what_was_not_run() -> None:
    lines = summary_table([_row()], BEFORE, ["rnp", "auto"], models=2).splitlines()
    assert lines[2] == "| rnp | 1, 1 not run | 2.0 (2.0) | 2.0 (2.0) | 98.0 | 50.0 | 4 |"
    assert lines[3] == "| auto | not run | | | | | |"


def test_a_row_says_what_was_repaired_and_gives_the_model() -> None:
    known = planted()
    row = repair_row(known.clean, known.data, "suspiciousness-20", 1, lambda model: {"ca": 1.0, "asr": None})
    assert row["images"] == 20 and row["after"] == {"ca": 1.0, "asr": None} and row["outcome"] == "unchecked"
    assert row["model_after"] is not known.clean and row["peak_mb"] > 0


def test_retuning_on_five_images_brings_a_backdoor_back() -> None:
    known = planted()
    rest, _ = hold_out(known.data, 0.3, 0)
    pixels = RawImages((known.test.images * 255).round().to(torch.uint8), known.test.labels)
    again = retuned(known.clean, CleanData(rest.images, rest.labels), pixels, known.trigger, known.target, 0)
    assert known.attack_success(again) > known.attack_success(known.clean)
    assert known.accuracy(again) > 0.5
