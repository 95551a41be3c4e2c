"""Time limits: models run in a process that can be killed."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

import torch

from bdprune.errors import ArtifactError, BdpruneError, OptionError, first_line
from bdprune.fleet.executors.inline import Executor, InlineExecutor, Numbered
from bdprune.pipeline import Clock, Job, ModelSource, Outcome, Progress, failure
from bdprune.process import keep_freed_memory
from bdprune.record import Result

LONGEST_TIMEOUT = 1_000_000
"""Seconds; the system's timers do not take much more."""


class TimeLimitError(BdpruneError):
    """A scan exceeded its time limit."""


class ProcessExecutor:
    """Runs another executor in a separate process. It kills the process at the time limit and starts a new one.

    Args:
        inner: the executor to run. If it reads models ahead, they are sent in batches. If a batch exceeds the sum of
            the time limits of its models, or its process dies, each unfinished model of the batch runs alone.
        timeout: seconds for each model, counted from when the process is ready for it.

    Raises:
        OptionError: the time limit is out of range.
    """

    def __init__(self, inner: Executor, timeout: float) -> None:
        if not 0 < timeout <= LONGEST_TIMEOUT:
            raise OptionError(
                f"Invalid timeout of {timeout:g} seconds.",
                f"Give more than 0 and up to {LONGEST_TIMEOUT} seconds.",
            )
        self._inner, self._timeout = inner, timeout

    def ahead(self, job: Job) -> int:
        return self._inner.ahead(job)

    def run(self, models: Iterable[ModelSource], job: Job, progress: Progress) -> Iterator[Numbered]:
        """The outcomes of all models, in order.

        Raises:
            OptionError: the detectors or the data cannot be sent to another process.
        """
        numbered, size = enumerate(models), self._inner.ahead(job)
        with Worker(self._inner, job) as worker, Worker(InlineExecutor(), job) as alone:
            while batch := list(itertools.islice(numbered, size)):
                yield from self._batch(batch, worker, alone, progress)

    def _batch(
        self, batch: Sequence[tuple[int, ModelSource]], worker: Worker, alone: Worker, progress: Progress
    ) -> Iterator[Numbered]:
        """The outcomes of a batch; if the batch fails, each of its unfinished models runs alone."""
        waiting = deque(batch)
        try:
            yield from worker.run(waiting, self._timeout, progress)
            return
        except (TimeLimitError, ArtifactError, OptionError) as error:
            if len(batch) == 1:
                yield batch[0][0], failure(batch[0][1], error, worker.job, worker.clock)
                return
        for one in list(waiting):
            yield from self._batch([one], alone, alone, progress)


class Worker:
    """A process that runs an executor; it starts at the first use, and again after it was killed.

    Attributes:
        clock: started with the last batch.
    """

    def __init__(self, executor: Executor, job: Job) -> None:
        self.job, self.clock = job, Clock()
        self._setting = _pickled((executor, job), "These detectors or data")
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()

    def run(self, waiting: deque[tuple[int, ModelSource]], timeout: float, progress: Progress) -> Iterator[Numbered]:
        """The outcomes of the models in ``waiting``; it removes each model from there when the model is done.

        Raises:
            TimeLimitError: the unfinished models took longer than ``timeout`` seconds each.
            ArtifactError: the process died.
            OptionError: a model cannot be sent to the process.
        """
        task = _pickled([source for _, source in waiting], "This model")
        self.clock = Clock()
        try:
            yield from self._exchange(task, waiting, timeout, progress)
        except TimeLimitError:
            self._kill()
            raise
        except (EOFError, ConnectionError):
            raise self._death() from None

    def _exchange(
        self, task: bytes, waiting: deque[tuple[int, ModelSource]], timeout: float, progress: Progress
    ) -> Iterator[Numbered]:
        pipe = self._ready()
        pipe.send_bytes(task)
        held: list[Outcome] = []  # outcomes of the first model, which may have more sets of weights
        place, total, deadline = 0, len(waiting), time.monotonic() + timeout * len(waiting)
        while pipe.poll(max(0.0, deadline - time.monotonic())):
            kind, value = json.loads(pipe.recv_bytes())
            if kind == "stage":
                progress(value)
                continue
            while place < (value["place"] if kind == "outcome" else total):  # the earlier models are done
                number, _ = waiting.popleft()
                yield from ((number, one) for one in held)
                held, place = [], place + 1
                deadline = time.monotonic() + timeout * len(waiting)
            if kind == "done":
                return
            held.append(_received(value, pipe))
        raise TimeLimitError(f"Timed out after {timeout:g} seconds.", "Allow more with --timeout.")

    def _ready(self) -> Connection:
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._setting), daemon=True)
            _start_without_interrupts(self._process)
            theirs.close()
            self._pipe.recv_bytes()
        return self._pipe

    def _death(self) -> ArtifactError:
        assert self._process is not None
        self._process.join(5)
        code = self._process.exitcode
        self._kill()
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        return ArtifactError(f"The scanning process {how}.", "It may have run out of memory.")

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None


def check_sendable(model: ModelSource) -> None:
    """Checks that a model can be sent to another process.

    Raises:
        OptionError: it cannot be pickled.
    """
    _pickled(model, "This model")


def _pickled(value: object, name: str) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise OptionError(
            f"{name} cannot be sent to another process: {first_line(error)}.", "Scan without a timeout, or give a path."
        ) from error


def _start_without_interrupts(process: BaseProcess) -> None:
    """Starts a process that never receives Ctrl-C, not even during its imports: its parent ends it.

    The new process inherits the blocked signals.
    """
    resource_tracker.ensure_running()  # ``start`` would do it, and unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, setting: bytes) -> None:
    """The loop of the other process: it receives batches of models and sends outcomes."""
    os.dup2(2, 1)  # keeps prints of this process out of the results
    executor, job = pickle.loads(setting)
    torch.set_num_threads(job.threads)
    keep_freed_memory()
    pipe.send_bytes(b"ready")
    while True:
        try:
            models: list[ModelSource] = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        for place, outcome in executor.run(models, job, lambda stage: _send(pipe, "stage", stage)):
            _send_outcome(pipe, place, outcome)
        _send(pipe, "done", None)


def _send_outcome(pipe: Connection, place: int, outcome: Outcome) -> None:
    digests = list(outcome.attachments)
    value = {"place": place, "result": outcome.result.to_json(), "attachments": digests, "sets": outcome.sets}
    _send(pipe, "outcome", value)
    for digest in digests:
        pipe.send_bytes(outcome.attachments[digest])


def _received(value: dict[str, Any], pipe: Connection) -> Outcome:
    contents = {digest: pipe.recv_bytes() for digest in value["attachments"]}
    return Outcome(Result.from_json(value["result"]), contents, value["sets"])


def _send(pipe: Connection, kind: str, value: Any) -> None:
    pipe.send_bytes(json.dumps((kind, value)).encode())
