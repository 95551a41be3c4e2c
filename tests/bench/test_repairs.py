"""Rows and tables of repairs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bdprune.attacks.badnets import BadNets
from bdprune.data import CleanData, RawImages
from bdprune.errors import DataError, SanityError
from bdprune.methods import hold_out
from bdprune.model import Model
from bdprune.testing.planted import planted

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import repairs
from memory import peak_mb, start_peak
from published import has_published_settings, published
from repairs import (
    Method,
    comparison_table,
    defence_rate,
    missing_rows,
    parse_method,
    repair_row,
    repair_table,
    retuned,
    success_table,
    summary_table,
)
from rows import Rows

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
        "peak_mb": 300,
        "seed": 0,
    }
    return row | {"after": {"ca": 88.0, "asr": 2.0, "ra": 85.0}, "outcome": "repaired", "retuned": 50.0} | fields


def test_methods_have_a_name_a_preset_and_a_number_of_images() -> None:
    assert parse_method("rnp") == Method((("rnp", None),), 500)
    assert parse_method("rnp:paper") == Method((("rnp", "paper"),), 500)
    assert parse_method("suspiciousness-10") == Method((("suspiciousness", None),), 10)
    assert parse_method("rnp+nad-100") == Method((("rnp", None), ("nad", None)), 100)
    assert [one.params.get("seed") for one in parse_method("rnp:paper+clp").purifiers(3)] == [3, 3]
    with pytest.raises(ValueError, match="There is no purifier 'magic'"):
        parse_method("magic-10")


def test_the_defence_rate_counts_half_of_both_falls() -> None:
    assert defence_rate(BEFORE["m"], {"ca": 88.0, "asr": 0.0}) == 99.0
    assert defence_rate(BEFORE["m"], {"ca": 95.0, "asr": 100.0}) == 50.0


def test_the_table_has_means_and_worst_over_the_seeds() -> None:
    rows = [_row(), _row(after={"ca": 86.0, "asr": 6.0, "ra": 83.0}, pruned=9)]
    lines = repair_table(rows, BEFORE, {"m"}).splitlines()
    assert lines[2] == (
        "| m | 100.0 | 4.0 (6.0) | 90.0 | 87.0 (86.0) | 84.0 | 96.5 | pruned, 7 to 9 filters | repaired | 50.0 | 4 "
        "| 300 | 0.20 / 92.22, 41 filters |"
    )
    assert repair_table(rows, BEFORE).splitlines()[2].endswith("| 300 | – |")  # another attack than the paper's
    assert lines[-1].startswith(
        "1 backdoored models: ASR 4.00 on average and 6.00 in the worst run; CA falls by 3.00 points"
    )
    assert "on average and 4.00 in the worst run; DER" in lines[-1]


def test_clean_models_have_their_own_line() -> None:
    row = _row(model="c", kind=None, truth=None, after={"ca": 79.5, "asr": None, "ra": None}, retuned=None, pruned=0)
    text = repair_table([row | {"change": "nothing"}], BEFORE)
    assert "| c | – | – | 80.0 | 79.5 (79.5) | – | – | nothing |" in text
    assert text.endswith("1 clean models: CA falls by at most 0.50 points.")
    better = row | {"after": {"ca": 80.5, "asr": None, "ra": None}}
    assert repair_table([row, better], BEFORE).endswith("CA falls by at most 0.50 points."), "the worst run counts"


def test_the_summary_names_what_was_not_run() -> None:
    lines = summary_table([_row()], BEFORE, ["rnp", "auto"], {"m", "other"}).splitlines()
    assert lines[2] == "| rnp | 1, 1 not run | 2.0 (2.0) | 2.0 (2.0) | 98.0 | 50.0 | 4 | 300 |"
    assert lines[3] == "| auto | not run | | | | | | |"
    (line,) = summary_table([_row(), _row(retuned=None)], BEFORE, ["rnp"], {"m"}).splitlines()[2:]
    assert "| 50.0 (1 of 2) |" in line


def test_the_success_of_every_method_on_every_backdoored_model_is_shown() -> None:
    rows = [_row(), _row(seed=1, after={"ca": 86.0, "asr": 4.0, "ra": 85.0}), _row(model="c", method="nad")]
    lines = success_table(rows, BEFORE, ["rnp", "nad"]).splitlines()
    assert lines[0] == "| model | before | rnp | nad |"
    assert lines[2:] == ["| m | 100 | 3 (3.0) | – |"]


def test_missing_and_failed_rows_are_named() -> None:
    def fail() -> dict[str, Any]:
        raise DataError("10 images are too few.", "Give more.")

    record = Rows(None, ("part", "model", "method", "seed"))
    for seed, make in ((0, _row), (1, fail)):
        record.add({"part": "repair", "model": "m", "method": "rnp", "seed": seed}, make)
    assert missing_rows(record, ["m", "other"], ["rnp"], 2).splitlines() == [
        "Not run by rnp: m (seeds 1), other (seeds 0, 1).",
        "Failed: m by rnp, seed 1: 10 images are too few. Give more.",
    ]
    assert not missing_rows(record, ["m"], ["rnp"], 1).partition("\n")[0].startswith("Not run")


def test_methods_are_compared_on_one_model() -> None:
    lines = comparison_table([_row(), _row(method="nad", change="retrained", retuned=None)], BEFORE["m"]).splitlines()
    assert lines[2] == "| before | 100.0 | 90.0 | | | | | |"
    assert lines[3] == "| `rnp` | 2.0 | 88.0 | 85.0 | 50.0 | pruned | 4 | 300 |"
    assert lines[4] == "| `nad` | 2.0 | 88.0 | 85.0 | – | retrained | 4 | 300 |"


def test_figures_of_others_are_those_of_the_same_attack() -> None:
    assert has_published_settings(BadNets(target=3)) and has_published_settings(BadNets(target=None, rate=0.3))
    for other in (None, BadNets(target=3, rate=0.01), BadNets(target=3, size=1), BadNets(target=3, sources=(1,))):
        assert not has_published_settings(other)
    assert published("nad", "badnets", all_to_all=False) == "1.20 / 90.64"
    assert published("clp", "badnets", all_to_all=False).endswith("(RNP)")
    assert {published(name, "badnets", all_to_all=False) for name in ("rnp-100", "rnp+nad")} == {"–"}


def test_the_peak_is_that_of_one_measurement() -> None:
    device = torch.device("cpu")
    start_peak(device)
    before = peak_mb(device)
    large = torch.ones(64 << 20, dtype=torch.uint8) * 1
    assert peak_mb(device) >= before + 60
    del large
    start_peak(device)
    if Path("/proc/self/clear_refs").exists():
        assert peak_mb(device) < before + 40


def test_a_row_says_what_was_repaired_and_gives_the_model() -> None:
    known = planted()
    row = repair_row(known.clean, known.data, "suspiciousness-20", 1, lambda model: {"ca": 1.0, "asr": None})
    assert row["images"] == 20 and row["after"] == {"ca": 1.0, "asr": None} and row["outcome"] == "unchecked"
    assert row["model_after"] is not known.clean and row["peak_mb"] > 0


def test_images_that_are_missing_or_of_another_task_are_an_error() -> None:
    known = planted()
    with pytest.raises(DataError, match="takes 1000 images, and there are"):
        repair_row(known.clean, known.data, "clp-1000", 1, lambda model: {})
    wrong = CleanData(known.data.images, (known.data.labels + 1) % known.clean.num_classes)
    with pytest.raises(SanityError):
        repair_row(known.clean, wrong, "clp", 1, lambda model: {})


def test_methods_are_applied_one_after_another() -> None:
    known = planted()
    row = repair_row(known.clean, known.data, "suspiciousness+fine_tuning", 1, lambda model: {"ca": 1.0, "asr": None})
    assert row["change"] == "pruned and retrained" and row["pruned"] > 0


def test_images_are_mirrored_only_as_the_product_does(monkeypatch: pytest.MonkeyPatch) -> None:
    known, seen = planted(), []

    def rule(model: Model, data: CleanData) -> tuple[CleanData, str]:
        seen.append(len(data))
        return replace(data, mirror=False), "They are not."

    monkeypatch.setattr(repairs, "mirror_rule", rule)
    repair_row(known.clean, known.data, "suspiciousness-20", 1, lambda model: {"ca": 1.0, "asr": None})
    assert seen == [20]


def test_retuning_on_five_images_brings_a_backdoor_back() -> None:
    known = planted()
    rest, _ = hold_out(known.data, 0.3, 0)
    pixels = RawImages((known.test.images * 255).round().to(torch.uint8), known.test.labels)
    again = retuned(
        known.clean, CleanData(rest.images, rest.labels), pixels, known.trigger, BadNets(target=known.target), 0
    )
    assert known.attack_success(again) > known.attack_success(known.clean)
    assert known.accuracy(again) > 0.5
