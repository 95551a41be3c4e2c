"""A process that scans models one after another and can be killed when one takes too long."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import signal
import time
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

import torch

from bdprune.errors import ArtifactError, BdpruneError, OptionError, first_line
from bdprune.pipeline import Clock, Job, ModelSource, Progress, failure, scan_one
from bdprune.record import Result


class TimeLimitError(BdpruneError):
    """A scan took longer than it was allowed to."""


class Worker:
    """Scans in another process, which is started when first needed and again after it had to be killed.

    Args:
        job: what is the same for every model.
        timeout: seconds for each model, counted from when the process is ready for it.
    """

    def __init__(self, job: Job, timeout: float) -> None:
        self._job = job
        self._job_bytes = _pickled(job, "These detectors or data")
        self._timeout = timeout
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()

    def scan(self, source: ModelSource, progress: Progress) -> list[Result]:
        """Results of one file; a scan that takes too long, or whose process dies, gives the verdict ``error``.

        Raises:
            OptionError: a model that cannot be sent to another process.
        """
        task = _pickled(source, "This model")
        clock = Clock()
        try:
            return self._exchange(task, progress)
        except TimeLimitError as error:
            self._kill()
            return [failure(source, error, self._job, clock)]
        except (EOFError, ConnectionError):
            return [failure(source, self._obituary(), self._job, clock)]

    def _exchange(self, task: bytes, progress: Progress) -> list[Result]:
        pipe = self._ready()
        pipe.send_bytes(task)
        deadline = time.monotonic() + self._timeout
        while pipe.poll(max(0.0, deadline - time.monotonic())):
            kind, value = json.loads(pipe.recv_bytes())
            if kind == "stage":
                progress(value)
            else:
                return [Result.from_json(one) for one in value]
        raise TimeLimitError(f"Timed out after {self._timeout:g} seconds.", "Allow more with --timeout.")

    def _ready(self) -> Connection:
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._job_bytes), daemon=True)
            _start_deaf(self._process)
            theirs.close()
            self._pipe.recv_bytes()
        return self._pipe

    def _obituary(self) -> ArtifactError:
        assert self._process is not None
        self._process.join(5)
        code = self._process.exitcode
        self._kill()
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        return ArtifactError(f"The process that scanned it {how}.", "It may have run out of memory.")

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None


def _pickled(value: object, name: str) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise OptionError(
            f"{name} cannot be sent to another process: {first_line(error)}.", "Scan without a timeout, or by path."
        ) from error


def _start_deaf(process: BaseProcess) -> None:
    """Starts a process to which Ctrl-C never comes, not even while it is still importing: its parent ends it.

    A new process inherits which signals are held back.
    """
    resource_tracker.ensure_running()  # ``start`` would do it, and let the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, job_bytes: bytes) -> None:
    """Runs in the other process: models come in, stages and results go out as JSON."""
    job: Job = pickle.loads(job_bytes)
    torch.set_num_threads(job.threads)
    pipe.send_bytes(b"ready")
    while True:
        try:
            source: ModelSource = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        _say(pipe, *_answer(source, job, pipe))


def _answer(source: ModelSource, job: Job, pipe: Connection) -> tuple[str, Any]:
    try:
        results = scan_one(source, job, lambda stage: _say(pipe, "stage", stage))
    except Exception as error:
        results = [failure(source, error, job)]
    return "results", [one.to_json() for one in results]


def _say(pipe: Connection, kind: str, value: Any) -> None:
    pipe.send_bytes(json.dumps((kind, value)).encode())
