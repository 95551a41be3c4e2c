"""One model after another, in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bdprune.fleet.executors.base import Numbered
from bdprune.pipeline import Job, ModelSource, Progress, scan_one


@dataclass(frozen=True)
class InlineExecutor:
    """The plainest executor."""

    def ahead(self, job: Job) -> int:
        return 1

    def run(self, models: Iterable[ModelSource], job: Job, progress: Progress) -> Iterator[Numbered]:
        """The outcomes of all models, in order."""
        for number, source in enumerate(models):
            for outcome in scan_one(source, job, progress):
                yield number, outcome
