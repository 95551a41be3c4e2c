"""Models run in processes, several at a time, each of which is killed when it exceeds a limit of time or memory."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Self

import torch

from bdprune import environment
from bdprune.errors import BdpruneError, OptionError
from bdprune.fleet.executors.batches import Batch, Batches
from bdprune.fleet.executors.inline import Executor, Limits, Models, Numbered, Pause
from bdprune.fleet.executors.worker import InvalidLimitError, Worker, pickled, setting_of
from bdprune.pipeline import Job, ModelSource, Progress, parse_device, silent
from bdprune.process import usable_cores

MOST_WORKERS = 1024


class ProcessExecutor:
    """Runs another executor in separate processes. It kills a process at a limit and starts a new one.

    A model whose process exceeds a limit or dies gets an error, and the other models go on. The processes end with the
    run, and also if this process is killed. Limits apply while the caller waits for the next outcome.

    Args:
        inner: the executor to run. If it reads models ahead, they are sent in batches. If a batch exceeds the sum of
            the time limits of its models, or its process dies, each unfinished model of the batch runs alone.
        limits: of each process.
        workers: number of processes, or ``auto``: one for each GPU, or on a CPU one for each core that this process
            may use. They share the cores. With several GPUs, each process sees only one of them.

    Raises:
        OptionError: the number of processes is out of range.
    """

    def __init__(self, inner: Executor, limits: Limits | None = None, workers: int | str = 1) -> None:
        if workers != "auto" and (not isinstance(workers, int) or not 1 <= workers <= MOST_WORKERS):
            raise OptionError(
                f"Invalid number of workers {str(workers)[:80]}.", f"Give auto, or a number from 1 to {MOST_WORKERS}."
            )
        self._inner, self._limits, self._workers = inner, limits or Limits(), workers

    def ahead(self, job: Job) -> int:
        return self._inner.ahead(job)

    def run(self, models: Models, job: Job, progress: Progress) -> Iterator[Numbered | None]:
        """The outcomes of all models; with several processes in the order in which the models are done.

        Raises:
            OptionError: the detectors or the data cannot be sent to another process, or a process needs more memory
                than the limit before its first model.
        """
        with Pool(self._inner, job, self._limits, self._count(job)) as pool:
            yield from pool.run(models, progress)

    def _count(self, job: Job) -> int:
        if isinstance(self._workers, int):
            return self._workers
        return len(_gpus(job)) or usable_cores()


class Pool:
    """The processes of a run; they start when there are models for them.

    Args:
        inner: the executor to run.
        job: the settings.
        limits: of each process.
        workers: number of processes.

    Raises:
        OptionError: the settings cannot be sent to another process.
    """

    def __init__(self, inner: Executor, job: Job, limits: Limits, workers: int) -> None:
        self._job, self._size = job, inner.ahead(job)
        threads = job.threads if workers == 1 else max(1, min(job.threads, usable_cores() // workers))
        setting, gpus = setting_of(inner, replace(job, threads=threads), limits), _gpus(job)
        chosen = [gpus[place % len(gpus)] if len(gpus) > 1 and workers > 1 else None for place in range(workers)]
        self._workers = [Worker(setting, limits, gpu) for gpu in chosen]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.close()

    def run(self, models: Models, progress: Progress = silent) -> Iterator[Numbered | None]:
        """The outcomes of the models, those of one model in a row."""
        batches = Batches(models, self._size, len(self._workers), self._job)
        stage = progress if len(self._workers) == 1 else silent  # the stages of several models would mix
        while True:
            started, failed = self._start(batches)
            if started and len(self._workers) > 1:
                progress(f"running {sum(len(one.models) for one in self._running())} models at a time")
            yield from failed
            busy = [one for one in self._workers if one.batch is not None]
            if busy:
                yield from self._step(busy, batches, stage)
            elif not failed and batches.pause is None:
                return
            if batches.pause is not None:
                yield None

    def _running(self) -> list[Batch]:
        return [one.batch for one in self._workers if one.batch is not None]

    def _start(self, batches: Batches) -> tuple[bool, list[Numbered]]:
        """Gives batches to idle processes; returns whether there were any, and outcomes of those that failed."""
        idle = [one for one in self._workers if one.batch is None]
        given, failed = batches.take(len(idle)), list[Numbered]()
        for worker, batch in zip(idle, given, strict=False):
            try:
                worker.give(batch)
            except BdpruneError as error:
                failed += batches.failed(batch, error)
                worker.batch = None
        return bool(given), failed

    def _step(self, busy: Sequence[Worker], batches: Batches, progress: Progress) -> list[Numbered]:
        """Waits for the next messages or limit, and handles them; returns the outcomes of models that are done."""
        due = -math.inf if batches.pause is Pause.LOOKING else min(worker.due() for worker in busy)
        timeout = None if due == math.inf else max(0.0, due - time.monotonic())
        ready = set(wait([worker.pipe for worker in busy], timeout))
        found = list[Numbered]()
        for worker in busy:
            batch = worker.batch
            assert batch is not None
            try:
                if worker.pipe not in ready:
                    worker.check()
                elif outcomes := worker.receive(progress):
                    number = batches.done(batch)
                    found += [(number, one) for one in outcomes]
            except InvalidLimitError:
                raise
            except BdpruneError as error:
                worker.close()
                worker.batch = None
                found += batches.failed(batch, error)
        return found


def check_sendable(model: ModelSource) -> None:
    """Checks that a model can be sent to another process.

    Raises:
        OptionError: it cannot be pickled.
    """
    pickled(model, "This model")


def _gpus(job: Job) -> list[str]:
    """A value of ``CUDA_VISIBLE_DEVICES`` for each GPU that the run may use; empty on a CPU."""
    device = parse_device(job.options.device)
    if device.type != "cuda":
        return []
    if ":" in str(device):  # the user chose one
        return [""]
    names = [name.strip() for name in environment.CUDA_VISIBLE_DEVICES.get().split(",") if name.strip()]
    count = torch.cuda.device_count()
    return names[:count] if len(names) >= count else [str(place) for place in range(count)]
