"""Tables of verdicts on models of known truth."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
from verdicts import leader, verdict_table


def _row(**fields: Any) -> dict[str, Any]:
    row = {"model": "m", "kind": "badnets", "truth": 3, "verdict": "backdoored", "label": 3, "labels": []}
    return row | {"scores": {"bdprune.inversion": 2.0}, "seconds": 10.0} | fields


def test_the_table_counts_verdicts_and_labels_of_all_seeds() -> None:
    rows = [_row(), _row(scores={"bdprune.inversion": 4.0}, seconds=12.0), _row(verdict="suspicious", label=None)]
    assert verdict_table(rows).splitlines()[2] == (
        "| m | 3 | 2 x backdoored, 1 x suspicious | 2 x 3, 1 x none | 2.00 to 4.00 | – | – | 10 |"
    )


def test_the_table_names_clean_models_and_those_with_several_targets() -> None:
    rows = [_row(model="c", kind=None, truth=None), _row(model="a", truth=None, label=None, labels=[1, 2])]
    clean, every = verdict_table(rows).splitlines()[2:]
    assert clean.startswith("| c | clean |")
    assert every.startswith("| a | every label |") and "| 1 x 1,2 |" in every


def test_the_leader_is_the_label_with_the_largest_score() -> None:
    assert leader([None, 0.2, 0.9, None]) == 2
