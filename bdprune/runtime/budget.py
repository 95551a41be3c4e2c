"""How far a scan goes: which detectors run, how thorough they are, and how long they may take."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, field, replace

from bdprune.errors import BudgetError, OptionError
from bdprune.record import LEVELS, Level

LONGEST = 1_000_000
"""Seconds; more is no limit in practice."""

_UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


@dataclass(frozen=True)
class Budget:
    """How far the scan of one model goes.

    Args:
        level: ``fast``, ``default`` or ``full``: a scan runs the detectors of this level and below, and detectors that
            can be more or less thorough follow it.
        seconds: time for one model; None sets no limit. What does not fit is not run, and the findings name it.
        deadline: the time of :func:`time.monotonic` at which the work must end; :meth:`started` sets it.
        reserved: seconds before the deadline that are left to other work (:meth:`less`). Budgets that differ only in
            this are equal, so that later work finds the results of earlier work.

    Raises:
        OptionError: an unknown level, or a time that is not positive.
    """

    level: Level = "default"
    seconds: float | None = None
    deadline: float = math.inf
    reserved: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise _invalid(self.level)
        if self.seconds is not None and not 0 < self.seconds <= LONGEST:
            raise _invalid(f"{self.seconds:g} seconds")

    def __str__(self) -> str:
        """The level, or the seconds of a default budget with a time limit."""
        if self.seconds is None:
            return self.level
        time = f"{self.seconds:g} s"
        return time if self.level == "default" else f"{self.level}, {time}"

    def started(self, spent: float = 0.0, models: int = 1) -> Budget:
        """The budget with a deadline.

        Args:
            spent: seconds that are used already.
            models: number of models that share their time.
        """
        return (
            self if self.seconds is None else replace(self, deadline=time.monotonic() + self.seconds * models - spent)
        )

    @property
    def remaining(self) -> float:
        """Seconds that are left, 0 or more; infinite without a limit."""
        return max(0.0, self.deadline - self.reserved - time.monotonic())

    def share(self, part: float) -> float | None:
        """Seconds of this part of the time that is left, from 0 to 1; None without a limit."""
        return None if math.isinf(self.deadline) else part * self.remaining

    def less(self, seconds: float) -> Budget:
        """The budget with this many seconds less, which are left to other work."""
        return replace(self, reserved=self.reserved + seconds)

    def check(self, needed: float = 0.0) -> None:
        """Raises an error if the time does not suffice.

        Args:
            needed: seconds that the rest of the work takes at least.

        Raises:
            BudgetError: the deadline has passed, or comes too early.
        """
        if self.deadline - self.reserved < time.monotonic() + needed:
            left = f"{self.remaining:.0f} s of the budget are left"
            more = f"It needs about {needed:.0f} s more, and {left}." if needed else "The time of the budget is up."
            raise BudgetError(more, "Allow more with --budget.")


def parse_budget(value: str | float | Budget | None) -> Budget:
    """A level (``fast``, ``default``, ``full``), or a time (``300``, ``90s``, ``5m``); None is the default budget.

    Raises:
        OptionError: it is neither.
    """
    if value is None or isinstance(value, Budget):
        return value or Budget()
    if isinstance(value, int | float):
        return Budget(seconds=float(value))
    if value in LEVELS:
        return Budget(value)
    parts = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) ?(s|min|m|h)?", value)
    if parts is None:
        raise _invalid(repr(value[:80]))
    return Budget(seconds=float(parts[1]) * _UNITS[parts[2] or ""])


def _invalid(what: str) -> OptionError:
    return OptionError(
        f"Invalid budget {what}.", f"Give {', '.join(LEVELS)}, or a time in seconds of more than 0 and up to {LONGEST}."
    )
