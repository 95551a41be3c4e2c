"""The interface of executors, which decide where models run and how many at a time, and the simplest executor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from bdprune.pipeline import Job, ModelSource, Outcome, Progress, scan_one

Numbered = tuple[int, Outcome]
"""The number of a model in its run, from 0, and the outcome of one set of weights of its file."""


class Executor(Protocol):
    """Runs the pipeline on models."""

    def ahead(self, job: Job) -> int:
        """How many models it reads before the first of them is done; 1 means one after another."""
        ...

    def run(self, models: Iterable[ModelSource], job: Job, progress: Progress) -> Iterator[Numbered]:
        """Yields the outcomes of all models in order. A model that fails does not stop the others."""
        ...


@dataclass(frozen=True)
class InlineExecutor:
    """One model after another, in this process."""

    def ahead(self, job: Job) -> int:
        return 1

    def run(self, models: Iterable[ModelSource], job: Job, progress: Progress) -> Iterator[Numbered]:
        """The outcomes of all models, in order."""
        for number, source in enumerate(models):
            for outcome in scan_one(source, job, progress):
                yield number, outcome
