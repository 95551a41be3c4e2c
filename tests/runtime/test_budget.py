"""Budgets: a level, a time limit, and what is left of it."""

from __future__ import annotations

import math
import pickle

import pytest

from bdprune.errors import BudgetError, OptionError
from bdprune.runtime import budget as budgets
from bdprune.runtime.budget import Budget, parse_budget


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still."""
    now = [1000.0]
    monkeypatch.setattr(budgets.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("value", "level", "seconds", "text"),
    [
        (None, "default", None, "default"),
        ("fast", "fast", None, "fast"),
        ("full", "full", None, "full"),
        (300, "default", 300.0, "300 s"),
        ("300", "default", 300.0, "300 s"),
        ("1.5 s", "default", 1.5, "1.5 s"),
        ("5m", "default", 300.0, "300 s"),
        ("2h", "default", 7200.0, "7200 s"),
        (Budget("full", 60), "full", 60, "full, 60 s"),
    ],
)
def test_a_budget_is_a_level_or_a_time(value: object, level: str, seconds: float | None, text: str) -> None:
    found = parse_budget(value)  # type: ignore[arg-type]
    assert (found.level, found.seconds, str(found)) == (level, seconds, text)


@pytest.mark.parametrize("value", ["slow", "", "-5", "0", 0, -1.0, math.nan, math.inf, 2e6, "5d", "fast\n"])
def test_anything_else_is_an_error(value: object) -> None:
    with pytest.raises(OptionError, match="Invalid budget") as caught:
        parse_budget(value)  # type: ignore[arg-type]
    assert "fast, default, full, or a time in seconds" in str(caught.value)


def test_time_runs_from_the_start(clock: list[float]) -> None:
    budget = Budget(seconds=60)
    assert budget.remaining == math.inf
    started = budget.started(spent=10)
    assert started.remaining == 50 and budget.started(spent=10, models=3).remaining == 170
    clock[0] += 20
    assert started.remaining == 30 and started.less(25).remaining == 5 and started.less(20).less(5).remaining == 5
    assert started.less(25) == started != budget
    clock[0] += 40
    assert started.remaining == 0


def test_a_budget_without_seconds_has_no_end(clock: list[float]) -> None:
    started = Budget("full").started()
    started.check(1e9)
    assert started.remaining == started.less(1e9).remaining == math.inf


def test_work_that_does_not_fit_is_an_error(clock: list[float]) -> None:
    started = Budget(seconds=60).started()
    started.check()
    started.check(59)
    for late, left in ((started, 60), (started.less(10), 50)):
        with pytest.raises(BudgetError, match=f"It needs about 61 s more, and {left} s of the budget are left"):
            late.check(61)
    clock[0] += 61
    with pytest.raises(BudgetError, match="The time of the budget is up"):
        started.check()


def test_it_can_be_sent_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(Budget("fast", 5))) == Budget("fast", 5)
