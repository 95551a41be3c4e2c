"""What an executor is: it decides where models run and how many at a time, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from bdprune.pipeline import Job, ModelSource, Outcome, Progress

Numbered = tuple[int, Outcome]
"""The number of a model in its run, from 0, and an outcome; a file with several sets of weights has several outcomes.
"""


class Executor(Protocol):
    """Takes models through the pipeline."""

    def ahead(self, job: Job) -> int:
        """How many models it wants to see before the first of them is done; 1 for one after another."""
        ...

    def run(self, models: Iterable[ModelSource], job: Job, progress: Progress) -> Iterator[Numbered]:
        """The outcomes of all models, in order, as they come. A model that fails does not stop the others."""
        ...
