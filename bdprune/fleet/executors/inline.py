"""What an executor is (it decides where models run and how many at a time, and nothing else), and the plainest one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from bdprune.pipeline import Job, ModelSource, Outcome, Progress, scan_one

Numbered = tuple[int, Outcome]
"""The number of a model in its run, from 0, and an outcome: one for each set of weights of its file."""


class Executor(Protocol):
    """Takes models through the pipeline."""

    def ahead(self, job: Job) -> int:
        """How many models it wants to see before the first of them is done; 1 for one after another."""
        ...

    def run(self, models: Iterable[ModelSource], job: Job, progress: Progress) -> Iterator[Numbered]:
        """The outcomes of all models, in order, as they come. A model that fails does not stop the others."""
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
