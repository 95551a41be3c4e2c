"""Models run on the nodes of a Ray cluster, which schedules them; this process reads and writes everything else."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import pickle
import re
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

import bdprune
from bdprune import environment
from bdprune.errors import ArtifactError, BdpruneError, OptionError, first_line
from bdprune.fleet.executors.batches import Batch, Batches
from bdprune.fleet.executors.inline import Executor, Limits, Models, Numbered, Pause, in_order
from bdprune.fleet.executors.process import MOST_WORKERS, Pool
from bdprune.pipeline import Job, ModelSource, Outcome, Progress, parse_device, silent
from bdprune.process import keep_freed_memory, usable_cores
from bdprune.record import Result

_TRIES = 3
"""How often a model is started on the cluster. A node that is taken away ends the models on it without their fault."""

_ADDRESS = re.compile(r"\[?([\w.:-]+?)\]?:(\d{1,5})")


_WAIT = 10.0
"""Seconds to wait for an answer of the cluster."""


class ClusterError(BdpruneError):
    """The Ray cluster is lost."""


class RayExecutor:
    """Runs another executor as tasks of a Ray cluster, each with one core, or with one core and one GPU.

    If a node or a worker dies, its models start again elsewhere. A model whose worker dies at each try gets an error.
    Only this process writes results. The nodes need the same version of bdprune and the same paths of files.

    With limits, each task runs its models in a process of its own, so a model that exceeds them does not end the
    worker. Evidence of single detectors is taken from a store only on a cluster that this executor starts, because
    other nodes cannot read the file; whole results always are.

    Args:
        inner: the executor to run. If it reads models ahead, a task gets a batch.
        limits: of each process.
        workers: maximum number of tasks at a time; ``auto`` uses the whole cluster.
        address: of the cluster, as in ``HOST:6379``; ``auto`` finds the one of this machine. None starts one here for
            each run. If this process is connected to a cluster already, it is used, and stays connected.

    Raises:
        OptionError: Ray is not installed, or a value is out of range.
    """

    def __init__(
        self, inner: Executor, limits: Limits | None = None, workers: int | str = "auto", address: str | None = None
    ) -> None:
        _imported()
        if address not in (None, "auto") and _ADDRESS.fullmatch(address) is None:
            raise OptionError(
                f"Invalid address of a Ray cluster {address[:80]!r}.",
                "Run on a node of the cluster, and give HOST:PORT of its head, or auto.",
            )
        if workers != "auto" and (not isinstance(workers, int) or not 1 <= workers <= MOST_WORKERS):
            hint = f"Give auto, or a number from 1 to {MOST_WORKERS}."
            raise OptionError(f"Invalid number of workers {str(workers)[:80]}.", hint)
        self._inner, self._limits, self._address = inner, limits or Limits(), address
        self._workers = workers if isinstance(workers, int) else None

    def ahead(self, job: Job) -> int:
        return self._inner.ahead(job)

    def run(self, models: Models, job: Job, progress: Progress) -> Iterator[Numbered | None]:
        """The outcomes of all models, in the order in which they are done.

        Raises:
            OptionError: the cluster cannot be reached or has no GPU, or the settings cannot be sent to it.
            ClusterError: the cluster is lost.
        """
        with _connected(self._address, self._workers) as is_own:
            device = parse_device(job.options.device).type
            job = replace(
                job,
                options=replace(job.options, device=device),  # each task sees one GPU
                recall=job.recall if is_own else None,
                threads=1,
            )
            yield from _Run(self._inner, job, self._limits, self._workers).outcomes(models, progress)


class _Run:
    """The tasks of one run."""

    def __init__(self, inner: Executor, job: Job, limits: Limits, workers: int | None) -> None:
        self._ray, self._job, self._workers, self._size = _imported(), job, workers, inner.ahead(job)
        self._kind = "GPU" if job.options.device == "cuda" else "CPU"
        if self._kind == "GPU" and not self._places():
            raise OptionError("The Ray cluster has no GPU.", "Start a node with a GPU first, or use --device cpu.")
        content = self._packed((inner, job, limits), "These detectors or data")
        place = bdprune.__version__, os.getcwd(), [os.path.abspath(one) for one in sys.path]
        self._key, self._setting = uuid.uuid4().hex, self._ray.put((*place, content))
        # Ray would start an own process for each task on a GPU if it were not told to keep them.
        asked = {"num_cpus": 1, "max_retries": 0, "max_calls": 0} | ({"num_gpus": 1} if self._kind == "GPU" else {})
        self._task = self._ray.remote(**asked)(scan_batch)
        self._running: dict[Any, Batch] = {}

    def outcomes(self, models: Models, progress: Progress) -> Iterator[Numbered | None]:
        """The outcomes of all models."""
        batches = Batches(models, self._size, self._workers or max(1, self._places()), self._job)
        try:
            while True:
                failed = self._start(batches, progress)
                yield from failed
                if self._running:
                    yield from self._finished(batches)
                elif not failed and batches.pause is None:
                    return
                if batches.pause is not None:
                    yield None
        except (self._ray.exceptions.RaySystemError, self._ray.exceptions.LocalRayletDiedError) as error:
            hint = "Check the cluster, and run the same command again."
            raise ClusterError(f"The Ray cluster is lost: {first_line(error)}.", hint) from error
        finally:
            self._cancel()

    def _places(self) -> int:
        """How many tasks the cluster can run at a time; nodes come and go."""
        return int(self._ray.cluster_resources().get(self._kind, 0))

    def _start(self, batches: Batches, progress: Progress) -> list[Numbered]:
        """Starts tasks; returns the outcomes of models that cannot be sent."""
        # A few more than there are places, so that none has to wait for this process, and the cluster may grow.
        most = self._workers or 2 * self._places() + 1
        failed = list[Numbered]()
        for batch in batches.take(most - len(self._running)):
            try:
                task = self._packed(batch.sources, "This model")
            except OptionError as error:
                failed += batches.failed(batch, error)
                continue
            self._running[self._task.remote(self._key, [self._setting], task)] = batch
            progress(f"running {sum(len(one.models) for one in self._running.values())} models on the cluster")
        return failed

    def _finished(self, batches: Batches) -> list[Numbered]:
        """Waits for a task; returns the outcomes of its models, or starts them again if its worker died."""
        done, _ = self._ray.wait(
            list(self._running), num_returns=1, timeout=0 if batches.pause is Pause.LOOKING else None
        )
        found = list[Numbered]()
        for task in done:
            batch = self._running.pop(task)
            try:
                rows = self._ray.get(task)
            except self._ray.exceptions.RayTaskError as error:
                found += batches.failed(batch, _explained(error))
            except self._ray.exceptions.RayError as error:
                if batch.size == 1 and batch.tries + 1 < _TRIES:
                    batches.repeat(batch)
                else:
                    found += batches.failed(batch, _death(error, batch.tries + 1))
            else:
                for outcomes in rows:
                    number = batches.done(batch)
                    found += [(number, Outcome(Result.from_json(text), more, sets)) for text, more, sets in outcomes]
                if batch.models:
                    found += batches.failed(batch, ArtifactError("The task gave no result.", "Please report it."))
        return found

    def _cancel(self) -> None:
        for task in self._running:
            with contextlib.suppress(Exception):  # it may be done, or the cluster lost
                self._ray.cancel(task, force=True)

    def _packed(self, value: object, name: str) -> bytes:
        try:
            content: bytes = self._ray.cloudpickle.dumps(value)
        except Exception as error:
            message = f"{name} cannot be sent to a Ray cluster: {first_line(error)}."
            raise OptionError(message, "Scan with the inline executor, or give a path.") from error
        return content


def _explained(error: Exception) -> BdpruneError:
    """Why a task failed that did not end its worker."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, BdpruneError):
        return cause
    hint = "All nodes need the same version of bdprune, and the packages of your architectures and detectors."
    return ArtifactError(f"The task failed on the cluster: {type(cause).__name__}: {first_line(cause)}.", hint)


def _death(error: Exception, tries: int) -> ArtifactError:
    how = f"{first_line(error).rstrip('.')[:200]}"
    times = "once" if tries == 1 else f"{tries} times"
    hint = "The model may need too much memory, or crash. --memory-limit ends only the process of such a model."
    return ArtifactError(f"The worker of the cluster died {times}: {how}.", hint)


class _Connection:
    """The connection of this process, which runs at the same time share: Ray has one for each process."""

    lock = threading.Lock()
    runs = 0
    ends: contextlib.ExitStack | None = None  # what is to do after the last run; None if Ray was connected before
    is_own_cluster = False


@contextlib.contextmanager
def _connected(address: str | None, workers: int | None) -> Iterator[bool]:
    """Connects to a cluster, or starts one here; says whether it did start one. Leaves an open connection as it is."""
    with _Connection.lock:
        if not _imported().is_initialized():
            _Connection.ends = _connect(address, workers)
            _Connection.is_own_cluster = address is None
        _Connection.runs += 1
    try:
        yield _Connection.is_own_cluster
    finally:
        with _Connection.lock:
            _Connection.runs -= 1
            if _Connection.runs == 0 and _Connection.ends is not None:
                _Connection.ends.close()
                _Connection.ends, _Connection.is_own_cluster = None, False


def _connect(address: str | None, workers: int | None) -> contextlib.ExitStack:
    """Connects; closing what it returns ends the connection.

    Raises:
        OptionError: there is no such cluster, or none can be started.
    """
    ray, more = _imported(), dict[str, Any]()
    _check_reachable(address)
    if address is None:
        more = {"num_cpus": workers or usable_cores(), "include_dashboard": False}
    with contextlib.ExitStack() as ends:
        ends.enter_context(_statistics_off())
        ends.callback(ray.shutdown)
        try:
            with _own_handlers():
                ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **more)
        except Exception as error:
            raise _no_cluster(address, error) from error
        ends.enter_context(_quiet())
        return ends.pop_all()


@contextlib.contextmanager
def _statistics_off() -> Iterator[None]:
    """Stops Ray's usage statistics, unless the user has set them."""
    statistics = environment.RAY_USAGE_STATS_ENABLED
    before = os.environ.get(statistics.name)
    os.environ[statistics.name] = statistics.get()
    try:
        yield
    finally:
        if before is None:
            del os.environ[statistics.name]


def _check_reachable(address: str | None) -> None:
    """Ray itself would try for minutes.

    Raises:
        OptionError: nothing answers there.
    """
    found = _ADDRESS.fullmatch(address or "")
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=_WAIT).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from None


def _no_cluster(address: str | None, error: Exception) -> OptionError:
    where = f"at {address}" if address else "on this machine"
    hint = "Start one as the documentation of Ray says, or leave out --address." if address else "Check Ray's logs."
    return OptionError(f"No Ray cluster {where}: {first_line(error)}.", hint)


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Keeps the caller's handler of SIGTERM, which Ray replaces."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if is_main and before is not None:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Stops Ray's messages on dead workers, which it prints on standard output even without ``log_to_driver``."""
    module, name = sys.modules.get("ray._private.worker"), "print_to_stdstream"
    before = getattr(module, name, None)
    if before is None:  # another version of Ray
        yield
        return
    setattr(module, name, lambda *args, **more: None)
    try:
        yield
    finally:
        setattr(module, name, before)


def _imported() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise OptionError(f"Ray cannot be used: {first_line(error)}.", "Run: pip install bdprune[cluster]") from None


# ---------------------------------------------------------------------------------------------- on the nodes


def scan_batch(key: str, setting: list[Any], task: bytes) -> list[list[tuple[str, dict[str, bytes], int]]]:
    """The task: the outcomes of some models, a list for each model.

    Args:
        key: of the setting, which a worker unpacks once.
        setting: its reference.
        task: the models.
    """
    if _Kept.key != key:
        _Kept.close()
        _Kept.open(*_imported().get(setting[0]))
        _Kept.key = key
    found: dict[int, list[tuple[str, dict[str, bytes], int]]] = {}
    for number, one in in_order(_Kept.run(pickle.loads(task))):
        found.setdefault(number, []).append((one.result.to_json(), dict(one.attachments), one.sets))
    return list(found.values())


class _Kept:
    """What a worker of the cluster keeps between tasks of a run: the executor, and its process if there are limits."""

    key = ""
    _executor: Executor
    _job: Job
    _pool: Pool | None = None

    @classmethod
    def open(cls, version: str, folder: str, imports: list[str], content: bytes) -> None:
        """Takes the settings of another run.

        Args:
            version: of bdprune, where the run was started.
            folder: the working directory there, for relative paths.
            imports: the folders from which modules are imported there.
            content: executor, job and limits.

        Raises:
            ClusterError: this node has another version of bdprune.
        """
        if version != bdprune.__version__:
            what = f"A node has bdprune {bdprune.__version__}, but the run was started with {version}."
            raise ClusterError(what, "Install the same version on all nodes.")
        with contextlib.suppress(OSError):
            os.chdir(folder)
        sys.path += [one for one in imports if one not in sys.path]
        executor, job, limits = pickle.loads(content)
        cls._executor, cls._job = executor, job
        if limits:
            cls._pool = Pool(executor, job, limits, 1)
        else:
            torch.set_num_threads(job.threads)
            keep_freed_memory()

    @classmethod
    def run(cls, models: list[ModelSource]) -> Iterator[Numbered | None]:
        """The outcomes of the models."""
        if cls._pool is not None:
            return cls._pool.run(models)
        return cls._executor.run(models, cls._job, silent)

    @classmethod
    def close(cls) -> None:
        """Ends the process of an earlier run."""
        if cls._pool is not None:
            cls._pool.__exit__()
        cls.key, cls._pool = "", None
