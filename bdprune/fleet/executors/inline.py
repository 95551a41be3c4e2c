"""The interface of executors, which decide where models run and how many at a time, and the simplest executor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from bdprune.errors import OptionError
from bdprune.pipeline import Job, ModelSource, Outcome, Progress, scan_one

Numbered = tuple[int, Outcome]
"""The number of a model in its run, from 0, and the outcome of one set of weights of its file."""


class Pause(Enum):
    """What may stand between the models of a run instead of a model."""

    LOOKING = "the next model is not known yet: ask again"
    FULL = "no model comes before another one is done"


Models = Iterable[ModelSource | Pause]
"""The models of a run. An executor answers each pause with a None among its outcomes."""

LONGEST_TIMEOUT = 1_000_000
"""Seconds; the system's timers do not take much more."""


@dataclass(frozen=True)
class Limits:
    """Limits of a process.

    Args:
        timeout: seconds for each model, counted from when the process is ready for it; None for no limit.
        memory: bytes of RAM of the process; None for no limit. Memory of a GPU does not count.

    Raises:
        OptionError: a limit is out of range.
    """

    timeout: float | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("timeout", self.timeout), ("memory limit", self.memory)):
            if value is not None and not isinstance(value, int | float):
                raise OptionError(f"The {name} {str(value)[:80]!r} is not a number.", "Give seconds, or bytes.")
        if self.timeout is not None and not 0 < self.timeout <= LONGEST_TIMEOUT:
            raise OptionError(
                f"Invalid timeout of {self.timeout:g} seconds.",
                f"Give more than 0 and up to {LONGEST_TIMEOUT} seconds.",
            )
        if self.memory is not None and self.memory < 1:
            raise OptionError(f"Invalid memory limit of {self.memory} bytes.", "Give more, as in --memory-limit 4GiB.")

    def __bool__(self) -> bool:
        return self.timeout is not None or self.memory is not None


class Executor(Protocol):
    """Runs the pipeline on models."""

    def ahead(self, job: Job) -> int:
        """How many models it reads before the first of them is done; 1 means one after another."""
        ...

    def run(self, models: Models, job: Job, progress: Progress) -> Iterator[Numbered | None]:
        """Yields the outcomes of all models, those of one model in a row. A model that fails does not stop the others.

        The order is that of the models, unless several run at the same time; ``in_order`` sorts them. At a pause it
        yields None, and goes on with the models that run.
        """
        ...


@dataclass(frozen=True)
class InlineExecutor:
    """One model after another, in this process."""

    def ahead(self, job: Job) -> int:
        return 1

    def run(self, models: Models, job: Job, progress: Progress) -> Iterator[Numbered | None]:
        """The outcomes of all models, in order."""
        number = 0
        for source in models:
            if isinstance(source, Pause):
                yield None
                continue
            for outcome in scan_one(source, job, progress):
                yield number, outcome
            number += 1


def in_order(numbered: Iterable[Numbered | None]) -> Iterator[Numbered]:
    """The outcomes in the order of the models; those of a model that is done early wait. Pauses are left out."""
    waiting: dict[int, list[Numbered]] = {}
    due = 0
    for one in numbered:
        if one is None:
            continue
        waiting.setdefault(one[0], []).append(one)
        while len(found := waiting.get(due, ())) and _is_whole(found):
            yield from waiting.pop(due)
            due += 1


def _is_whole(found: Sequence[Numbered]) -> bool:
    return len(found) == found[0][1].sets
