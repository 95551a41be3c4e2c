"""The models of a run that several workers scan at the same time: what is to do, what runs, and what is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from bdprune.errors import BdpruneError
from bdprune.fleet.executors.inline import Models, Numbered, Pause
from bdprune.pipeline import Clock, Job, ModelSource, failure

_AHEAD, _AHEAD_WITH_ATTACHMENTS = 256, 8  # models a worker may be ahead of the oldest model that still runs


@dataclass
class Batch:
    """Models that one worker scans.

    Attributes:
        models: those that are not done, in order, with their numbers in the run.
        alone: whether the batch is one model of a larger batch that failed.
        size: number of models at the start.
        tries: how often it was started before.
        clock: started when a worker got it.
    """

    models: deque[tuple[int, ModelSource]]
    alone: bool = False
    tries: int = 0
    size: int = field(init=False)
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.size = len(self.models)

    @property
    def sources(self) -> list[ModelSource]:
        """The models without their numbers."""
        return [source for _, source in self.models]


class Batches:
    """Gives out the models of a run as batches, in order.

    It reads ahead only so far that the outcomes which wait for an earlier model need little memory.

    Attributes:
        pause: why it gave out fewer models than were asked for, although more may come; None if there is no reason.

    Args:
        models: of the run.
        size: maximum number of models in a batch.
        workers: how many batches may run at the same time.
        job: the settings of the run.
    """

    def __init__(self, models: Models, size: int, workers: int, job: Job) -> None:
        self._models, self._size, self._job = iter(models), size, job
        self.pause: Pause | None = None
        ahead = _AHEAD_WITH_ATTACHMENTS if job.keeps else _AHEAD
        self._window = workers * max(ahead, 2 * size)
        self._again: deque[Batch] = deque()
        self._open: dict[int, None] = {}  # in order: the oldest model that is not done comes first
        self._next = 0

    def take(self, count: int) -> list[Batch]:
        """At most ``count`` batches; few models are spread over all of them."""
        self.pause = None
        found = [self._again.popleft() for _ in range(min(count, len(self._again)))]
        count -= len(found)
        room = self._window - (self._next - next(iter(self._open), self._next))
        models = list(self._read(min(count * self._size, room)))
        if not models:
            return found
        share = -(-len(models) // count)
        return found + [Batch(deque(models[at : at + share])) for at in range(0, len(models), share)]

    def _read(self, most: int) -> Iterator[tuple[int, ModelSource]]:
        """The next models with their numbers, up to the next pause."""
        for _ in range(most):
            try:
                source = next(self._models)
            except StopIteration:
                return
            if isinstance(source, Pause):
                self.pause = source
                return
            self._open[self._next] = None
            self._next += 1
            yield self._next - 1, source

    def done(self, batch: Batch) -> int:
        """Takes the first model, which is done, out of the batch; returns its number."""
        number, _ = batch.models.popleft()
        del self._open[number]
        return number

    def repeat(self, batch: Batch) -> None:
        """Gives out a batch once more."""
        batch.tries += 1
        self._again.append(batch)

    def failed(self, batch: Batch, error: BdpruneError) -> Iterator[Numbered]:
        """The outcome of a model that failed. If a larger batch failed, each of its models is given out alone."""
        if batch.size == 1 and batch.models:
            source = batch.models[0][1]
            yield self.done(batch), failure(source, error, self._job, batch.clock)
            return
        self._again.extend(Batch(deque([one]), alone=True) for one in batch.models)
