"""The form of a repair in a notebook; the methods that make repairs have their own tests."""

from __future__ import annotations

from typing import Any

import pytest

from bdprune.methods import Repair
from bdprune.record import Attempt, RepairCheck


def repair(model: Any, **more: Any) -> Repair:
    fields = {"method": "bdprune.rnp", "change": "pruned", "selection": "<best>", "pruned": {"conv": [1, 2]}}
    return Repair(**{"model": model, "accuracy_before": 0.93, "accuracy_after": 0.92, **fields, **more})


def test_a_notebook_shows_before_and_after(bright: Any) -> None:
    attempts = (Attempt(method="clp", accuracy_after=0.9, rejected="too inaccurate", seconds=2.0),)
    found = repair(bright.model, attempts=attempts)._repr_html_()
    for part in (
        "changed, not checked</span>",
        "93.0 % → 92.0 %",
        "2 filters in 1 filter group",
        "&lt;best&gt;",
        "too inaccurate",
    ):
        assert part in found, part


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"change": "nothing", "pruned": {}}, "unchanged"),
        ({"check": RepairCheck(lead_before=0.3, lead_after=0.3, left=("a lead",))}, "unrepaired"),
        ({"check": RepairCheck()}, "unverified"),
        ({"check": RepairCheck(lead_before=0.3, lead_after=0.0)}, "repaired</span>"),
        ({"accuracy_before": float("nan"), "accuracy_after": float("nan")}, "– → –"),
    ],
)
def test_outcomes_and_unknown_accuracies(bright: Any, more: dict[str, Any], word: str) -> None:
    assert word in repair(bright.model, **more)._repr_html_()
