"""A process that scans batches of models, and that is killed when it exceeds a limit."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import signal
import threading
import time
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from bdprune import environment
from bdprune.errors import ArtifactError, BdpruneError, OptionError, first_line
from bdprune.fleet.executors.batches import Batch
from bdprune.fleet.executors.inline import Executor, InlineExecutor, Limits, in_order
from bdprune.pipeline import Clock, Job, ModelSource, Outcome, Progress
from bdprune.process import end_with_parent, keep_freed_memory, resident_bytes, return_freed_memory
from bdprune.record import Result
from bdprune.report import size

_LONGEST_START = 900.0
"""Seconds that a process may take until it is ready: it imports torch and the plug-ins."""

_LOOK = 0.1
"""Seconds between two looks at the memory of a process."""


class TimeLimitError(BdpruneError):
    """A scan exceeded its time limit."""


class MemoryLimitError(BdpruneError):
    """A scan exceeded its memory limit."""


class Worker:
    """A process that runs an executor on one batch after another.

    It starts with its first batch, and again if it ended. Call :meth:`receive` when :attr:`pipe` has something to
    read, and :meth:`check` at the time that :meth:`due` gives.

    Args:
        setting: from :func:`setting_of`.
        limits: of the process.
        gpu: the value of ``CUDA_VISIBLE_DEVICES`` in the process; None leaves it as it is.

    Attributes:
        batch: the batch at hand; None if the process has nothing to do.
    """

    def __init__(self, setting: bytes, limits: Limits, gpu: str | None = None) -> None:
        self.batch: Batch | None = None
        self._setting, self._limits, self._gpu = setting, limits, gpu
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._task: bytes | None = None  # of the batch, while the process is not ready for it
        self._is_ready = False
        self._least = 0  # bytes of memory before the first model
        self._deadline = math.inf

    @property
    def pipe(self) -> Connection:
        """The connection to the process."""
        assert self._pipe is not None
        return self._pipe

    def give(self, batch: Batch) -> None:
        """Starts a batch.

        Raises:
            OptionError: a model cannot be sent to the process.
            ArtifactError: the process died.
        """
        task = pickled((batch.sources, batch.alone), "This model")
        self._end_if_spent()
        if self._pipe is None:
            self._start()
        self.batch, self._task, batch.clock = batch, task, Clock()
        self._begin()

    def receive(self, progress: Progress) -> list[Outcome]:
        """Reads one message: the outcomes of the first model of the batch if it is done, else none.

        After the last model, ``batch`` is None.

        Raises:
            ArtifactError: the process died.
            OptionError: the process cannot read the models, or needs more than the limit of memory to start.
        """
        assert self.batch is not None
        try:
            kind, value = json.loads(self.pipe.recv_bytes())
            if kind == "outcomes":
                self._set_deadline(len(self.batch.models) - 1)
                return [_received(one, self.pipe) for one in value]
        except (EOFError, OSError):
            raise self._death() from None
        if kind == "ready":
            self._is_ready = True
            self._check_start()
            self._begin()
        elif kind == "stage":
            progress(value)
        elif kind == "unreadable":
            raise OptionError(f"The model cannot be used in another process: {value}.", "Give the path of a file.")
        elif kind == "done":
            if self.batch.models:
                raise ArtifactError("The scanning process gave no result.", "Please report it.")
            self.batch = None
        return []

    def due(self) -> float:
        """The time of the monotonic clock of the next :meth:`check`."""
        return self._deadline if self._limits.memory is None else min(self._deadline, time.monotonic() + _LOOK)

    def check(self) -> None:
        """Kills the process if the batch exceeds a limit.

        Raises:
            TimeLimitError, MemoryLimitError: it does.
            ArtifactError: the process does not start.
        """
        if self.batch is None:
            return
        if time.monotonic() >= self._deadline:
            self.close()
            if not self._is_ready:
                raise ArtifactError(f"The scanning process did not start in {_LONGEST_START:g} seconds.")
            raise TimeLimitError(f"Timed out after {self._limits.timeout:g} seconds.", "Allow more with --timeout.")
        used, limit = self._memory(), self._limits.memory
        if self._is_ready and limit is not None and used > limit:
            self.close()
            raise MemoryLimitError(
                f"The scanning process took more than its {size(limit)} of memory.",
                "Allow more with --memory-limit.",
            )

    def close(self) -> None:
        """Kills the process."""
        self.kill()
        if self._process is not None:
            self._process.join(5)  # a process that waits for a broken disk cannot even be killed
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def kill(self) -> None:
        """Kills the process without waiting for its end."""
        if self._process is not None:
            self._process.kill()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        is_main = threading.current_thread() is threading.main_thread()
        own = (theirs, self._setting, self._gpu, os.getpid(), is_main)
        self._process, self._is_ready = context.Process(target=serve, args=own, daemon=True), False
        _start_without_interrupts(self._process)
        theirs.close()

    def _begin(self) -> None:
        """Sends the batch to the process if it is ready."""
        assert self.batch is not None and self._task is not None
        if not self._is_ready:
            self._deadline = time.monotonic() + _LONGEST_START
            return
        try:
            self.pipe.send_bytes(self._task)
        except OSError:
            raise self._death() from None
        self._task = None
        self._set_deadline(len(self.batch.models))

    def _set_deadline(self, models: int) -> None:
        """Allows the time of this many models."""
        timeout = self._limits.timeout
        self._deadline = math.inf if timeout is None else time.monotonic() + timeout * max(1, models)

    def _end_if_spent(self) -> None:
        """Ends a process that died, or that kept so much memory that the next model would be blamed for it."""
        if self._process is None:
            return
        limit = self._limits.memory
        if not self._process.is_alive() or (limit is not None and 2 * self._memory() > self._least + limit):
            self.close()

    def _check_start(self) -> None:
        self._least, limit = self._memory(), self._limits.memory
        if limit is not None and self._least > limit:
            raise InvalidLimitError(
                f"A scanning process takes {size(self._least)} of memory before its first model; the limit is "
                f"{size(limit)}.",
                "Allow more with --memory-limit.",
            )

    def _memory(self) -> int:
        return resident_bytes(self._process.pid) if self._process is not None and self._process.pid else 0

    def _death(self) -> ArtifactError:
        assert self._process is not None
        self._process.join(5)
        code, started = self._process.exitcode, self._is_ready
        self.close()
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        if not started and code is not None and code > 0:
            hint = 'Its error is on standard error. A script needs `if __name__ == "__main__":` around its scans.'
            return ArtifactError(f"The scanning process {how} before it was ready.", hint)
        return ArtifactError(f"The scanning process {how}.", "It may have run out of memory.")


class InvalidLimitError(OptionError):
    """The memory limit is too low for any model."""


def setting_of(executor: Executor, job: Job, limits: Limits) -> bytes:
    """What a process needs to know before its first batch.

    Raises:
        OptionError: it cannot be sent to another process.
    """
    return pickled((executor, job, limits.memory is not None), "These detectors or data")


def pickled(value: object, name: str) -> bytes:
    """The bytes of ``value`` for another process.

    Raises:
        OptionError: it cannot be pickled.
    """
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise OptionError(
            f"{name} cannot be sent to another process: {first_line(error)}.",
            "Scan with the inline executor, or give a path.",
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


def serve(pipe: Connection, setting: bytes, gpu: str | None, parent: int, by_main: bool) -> None:
    """The loop of the other process: it receives batches of models and sends outcomes."""
    end_with_parent(parent, by_kernel=by_main)
    os.dup2(2, 1)  # keeps prints of this process out of the results
    if gpu is not None:
        os.environ[environment.CUDA_VISIBLE_DEVICES.name] = gpu
    executor, job, saves_memory = pickle.loads(setting)
    torch.set_num_threads(job.threads)
    keep_freed_memory()
    _send(pipe, "ready", None)
    while True:
        try:
            task = pipe.recv_bytes()
        except EOFError:
            return
        _serve_batch(pipe, task, executor, job)
        if saves_memory:  # the next model must not be blamed for it
            return_freed_memory()
        _send(pipe, "done", None)


def _serve_batch(pipe: Connection, task: bytes, executor: Executor, job: Job) -> None:
    try:
        models: list[ModelSource]
        models, alone = pickle.loads(task)
    except Exception as error:
        _send(pipe, "unreadable", first_line(error))
        return
    del task
    chosen = InlineExecutor() if alone else executor
    found: list[Outcome] = []
    for _, outcome in in_order(chosen.run(models, job, lambda stage: _send(pipe, "stage", stage))):
        found.append(outcome)
        if len(found) == outcome.sets:
            _send_outcomes(pipe, found)
            found = []


def _send_outcomes(pipe: Connection, outcomes: list[Outcome]) -> None:
    """Sends the outcomes of one model, then the bytes of their attachments."""
    rows = [
        {"result": one.result.to_json(), "attachments": list(one.attachments), "sets": one.sets} for one in outcomes
    ]
    _send(pipe, "outcomes", rows)
    for one in outcomes:
        for content in one.attachments.values():
            pipe.send_bytes(content)


def _received(value: dict[str, Any], pipe: Connection) -> Outcome:
    contents = {digest: pipe.recv_bytes() for digest in value["attachments"]}
    return Outcome(Result.from_json(value["result"]), contents, value["sets"])


def _send(pipe: Connection, kind: str, value: Any) -> None:
    pipe.send_bytes(json.dumps((kind, value)).encode())
