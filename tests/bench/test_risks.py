"""The table applied to recorded scans."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import risks

from bdprune.verdict import own_table


def row(model: str, kind: str | None, verdict: str, **scores: float) -> dict[str, Any]:
    named = {f"bdprune.{name}": score for name, score in scores.items()}
    return {"model": model, "kind": kind, "truth": 1, "verdict": verdict, "scores": named}


QUIET = row("clean", None, "clean", inversion=1.8, unlearning=0.02, trigger_pruning=0.0, moved_filters=0.0)
LOUD = row("badnets", "badnets", "backdoored", inversion=8.0, unlearning=0.4)


def test_the_page_has_a_probability_and_a_p_value_for_each_scan() -> None:
    table = own_table("default")
    assert table is not None
    assert risks.risk_of(QUIET, table) < 0.5 < risks.risk_of(LOUD, table)
    assert risks.p_value_of(LOUD, table) < 0.05 < risks.p_value_of(QUIET, table)
    lines = risks.page([QUIET, LOUD], table).splitlines()
    assert lines[2].startswith("| clean | clean | clean | 0.") and lines[3].startswith("| badnets | backdoored |")


def test_the_trigger_of_a_model_that_is_called_clean_counts_as_natural() -> None:
    by_name = {one.detector: one for one in risks.evidence_of(QUIET)}
    assert by_name["bdprune.inversion"].natural and by_name["bdprune.inversion"].threshold == 1.7


def test_rows_of_other_budgets_and_of_repairs_are_left_out() -> None:
    scans = [row("a", None, "clean") | {"part": "scan", "method": "default", "seed": seed} for seed in (1, 0)]
    others = [scans[0] | {"method": "full"}, {"model": "a", "part": "repair", "method": "default", "seed": 0}]
    published = row("b", None, "clean") | {"budget": "default", "seed": 0}
    found = risks.of_default([*scans, *others, published])
    assert [(one["model"], one["seed"]) for one in found] == [("a", 0), ("a", 1), ("b", 0)]
