"""Scans one model or many: it checks the options once, and an executor runs the pipeline for each model."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, Unpack, get_args

import torch

from bdprune.data import check_apart
from bdprune.errors import OptionError
from bdprune.fleet.executors.inline import Executor, InlineExecutor, Limits, in_order
from bdprune.fleet.executors.process import ProcessExecutor, check_sendable
from bdprune.fleet.executors.ray import RayExecutor
from bdprune.fleet.executors.stack import StackExecutor, StackOptions
from bdprune.fleet.remote import RemoteModels
from bdprune.fleet.stored import StoredScans
from bdprune.methods import Detector
from bdprune.pipeline import (
    CallersRandom,
    CleanSource,
    DataSource,
    Job,
    ModelSource,
    OptionNames,
    Outcome,
    Progress,
    attachments_folder,
    free_memory,
    is_local,
    options_from,
    parse_device,
    silent,
    with_saved_attachments,
)
from bdprune.process import usable_cores
from bdprune.record import ATTENTION, LEVELS, Result
from bdprune.registry import chosen_detectors, unusable
from bdprune.runtime import Budget, parse_budget
from bdprune.store import Store
from bdprune.verdict import table_for

Folder = str | os.PathLike[str] | None


Kind = Literal["auto", "inline", "processes", "ray"]
"""Names of executors; ``auto`` follows from the other options."""


@dataclass(frozen=True)
class RunOptions:
    """Where models run, how many at a time, and within which limits.

    Args:
        stack: size and memory of stacks.
        executor: ``inline`` scans in this process, ``processes`` in other processes of this machine, ``ray`` on a Ray
            cluster. ``auto`` is ``ray`` with an address, ``processes`` with a limit or a number of workers, else
            ``inline``.
        workers: how many models run at a time; ``auto`` is one for each GPU, or on a CPU one for each core. None is
            ``auto`` if the executor is named, else 1.
        timeout: seconds for each model; None for no limit.
        memory_limit: bytes of RAM of each process; None for no limit.
        address: of a Ray cluster, as in ``HOST:6379`` or ``auto``; None starts one on this machine.

    Raises:
        OptionError: an option is invalid, or options do not fit each other.
    """

    stack: StackOptions
    executor: Kind = "auto"
    workers: int | Literal["auto"] | None = None
    timeout: float | None = None
    memory_limit: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.executor not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise OptionError(f"Unknown executor {str(self.executor)[:80]!r}.", f"Give one of {kinds}.")
        if self.kind != "ray" and self.address is not None:
            raise OptionError("Only the executor ray takes an address.", "Leave out --executor, or give ray.")
        if self.kind == "inline" and (self.workers is not None or self._limits):
            raise OptionError(
                "The executor inline takes no limits and no number of workers.",
                "Leave out --executor, or give another.",
            )

    @property
    def kind(self) -> Kind:
        """The executor, never ``auto``."""
        if self.executor != "auto":
            return self.executor
        if self.address is not None:
            return "ray"
        return "processes" if self._limits or self.workers is not None else "inline"

    @property
    def _limits(self) -> Limits:
        return Limits(self.timeout, self.memory_limit)

    def make(self, device: torch.device) -> Executor:
        """The executor.

        Args:
            device: where the models run.

        Raises:
            OptionError: an option is out of range, or Ray is not installed.
        """
        workers = ("auto" if self.executor == self.kind else 1) if self.workers is None else self.workers
        stack = self._stack(workers, device)
        inner: Executor = StackExecutor(stack) if stack.size != 1 else InlineExecutor()
        if self.kind == "inline":
            return inner
        if self.kind == "ray":
            if ":" in str(device):
                raise OptionError(f"A Ray cluster chooses its GPUs; {device} has no meaning there.", "Give cuda.")
            return RayExecutor(inner, self._limits, "auto" if self.workers is None else self.workers, self.address)
        return ProcessExecutor(inner, self._limits, workers)

    def _stack(self, workers: int | str, device: torch.device) -> StackOptions:
        """The options of stacks: within the memory limit of a process, and of several processes their part of it."""
        if self.stack.memory is not None or device.type != "cpu":
            return self.stack
        if self.memory_limit is not None:
            return replace(self.stack, memory=max(1, self.memory_limit // 2))
        if self.kind != "processes" or workers == 1:
            return self.stack
        count = workers if isinstance(workers, int) else usable_cores()
        return replace(self.stack, memory=max(1, free_memory(device) // 2 // max(1, count)))


class ScanNames(OptionNames, total=False):
    """Further keyword arguments of a scan."""

    budget: str | float | Budget | None
    calibration: str | os.PathLike[str] | None
    store: Store | str | os.PathLike[str] | None
    executor: Kind
    workers: int | Literal["auto"] | None
    memory_limit: int | None
    address: str | None


def scan(
    model: ModelSource,
    data: DataSource = None,
    *,
    detectors: Sequence[str | Detector] | str | None = None,
    timeout: float | None = None,
    attachments: Folder = None,
    progress: Progress | None = None,
    **options: Unpack[ScanNames],
) -> Result:
    """Verdict on one model. Bad files and bad data give the verdict ``error``, never an exception.

    If a file holds several sets of weights, it scans each and returns the most serious result; ``scan_many`` gives
    all of them.

    Args:
        model: path of a checkpoint, a module, or the model that ``bdprune.load`` returned; or the name of a repository
            on the Hugging Face Hub, ``hf:ORG/NAME[@REVISION][/FILE]``.
        data: labelled clean images: a class-per-folder tree, an ``.npz`` or parquet file, a torch Dataset or
            ``CleanData``. Without data, only data-free detectors run and the verdict is never ``clean``.
        detectors: names, detectors, or comma-separated names, which all run. None runs those of the budget, the
            cheapest first, until the verdict is sure.
        timeout: time limit in seconds, after which the verdict is ``error``. The scan then runs in its own process,
            so a script that uses it needs the usual ``if __name__ == "__main__":``.
        attachments: folder for the detectors' tensors and pictures, such as a trigger; None writes none.
        progress: called with a short text before each stage.
        **options: ``budget``: ``fast``, ``default`` (also None) or ``full``, which detectors run and how thorough they
            are, or the seconds that the scan of one model may take (findings name what does not fit);
            ``calibration``: path of a table that ``bdprune calibrate`` wrote, ``none`` for no table, or None for the
            table of this package, which needs the detectors of the budget; ``store``: a store of results
            (:class:`Scanner`), or its path; ``executor``, ``workers``, ``memory_limit`` and ``address``, as in
            :class:`Scanner`; and ``arch``, ``num_classes``, ``input_shape``, ``normalize``, ``device`` (``cpu``),
            ``seed`` (0), ``state_key``, ``per_class``, ``class_order``, ``precision``, ``skip_unknown`` and
            ``max_download``, as in ``Options``.

    Raises:
        OptionError: an option is invalid for every model; nothing was scanned.
        OutputError: the folder for attachments or the store cannot be written.

    Example:
        >>> result = scan("model.pth", "clean_images/", per_class=10, detectors=["lipschitz"])
        >>> result.data.count, result.data.clean_accuracy, [one.detector for one in result.detectors]
        (30, 1.0, ['bdprune.lipschitz'])
        >>> scan("missing.pth").error.message
        'Cannot load missing.pth: No such file or directory.'
    """
    with Scanner(data, detectors=detectors, timeout=timeout, stack=1, attachments=attachments, **options) as scanner:
        if scanner._pickles:
            check_sendable(model)
        return scanner.scan(model, progress)


def scan_many(
    models: Iterable[ModelSource],
    data: DataSource = None,
    *,
    detectors: Sequence[str | Detector] | str | None = None,
    timeout: float | None = None,
    stack: int | str | StackOptions = "auto",
    attachments: Folder = None,
    progress: Progress | None = None,
    **options: Unpack[ScanNames],
) -> Iterator[Result]:
    """Yields one result for every set of weights, in order; a model that fails does not stop the others.

    A repository on the Hub gives the results of all its checkpoints.

    It reads the clean data once. Arguments and errors are those of ``scan``; ``timeout`` applies to each model. An
    unexpected exception also becomes a verdict ``error``, and so does an option that is invalid for one model. With
    ``store``, results that are there are not computed again, and each new one is written as soon as it is ready.

    Args:
        stack: maximum number of models of one architecture in a stack, which are scanned in one batch. 1 scans one
            model at a time; ``auto`` uses stacks if a short trial finds them faster. ``StackOptions`` also sets the
            memory limit. With a time limit or a budget in seconds, a stack may take the sum of the times of its models.
    """
    scanner = Scanner(data, detectors=detectors, timeout=timeout, stack=stack, attachments=attachments, **options)
    return _closing(scanner, scanner.scan_many(models, progress))


def _closing(scanner: Scanner, results: Iterator[Result]) -> Iterator[Result]:
    with scanner:
        yield from results


class Scanner:
    """Scans many models with the same settings, which are checked once; it may be used from several threads.

    It prints nothing, handles no signals, and leaves random numbers and other global state as they were. In this
    process one model is scanned at a time, also for several threads; ``workers`` scan several. Use it as a context
    manager, which closes the store.

    With a store, a result that is there is taken from it: the same file, clean data, settings and version of bdprune.
    If only some detectors are missing, only these run. Each new result is written as soon as it is ready, so a process
    that dies loses only the models at hand. Failed scans are repeated. Models in memory are scanned every time and are
    not stored.

    Args:
        data: labelled clean images, as for ``bdprune.scan``.
        detectors: as for ``bdprune.scan_many``.
        timeout: the same.
        stack: the same.
        attachments: the same.
        **options: as for ``bdprune.scan``; ``store`` is a store or its path. ``executor`` says where models run:
            ``inline`` in this process, ``processes`` in other processes of this machine, ``ray`` on a Ray cluster
            (extra ``cluster``). The default ``auto`` is ``ray`` with an ``address``, ``processes`` with a limit or
            ``workers``, else ``inline``. ``workers`` is how many models run at a time; ``auto``, the default of a named
            executor, is one for each GPU, or on a CPU one for each core. ``memory_limit`` is the RAM in bytes that each
            process may use; a model that exceeds it gets the verdict ``error``. ``address`` is that of the cluster, as
            in ``HOST:6379`` or ``auto``; None starts Ray on this machine for the run. A script that uses processes
            needs the usual ``if __name__ == "__main__":``.

    Raises:
        OptionError: an option is invalid for every model, Ray is not installed or cannot be reached, or the store or
            the attachments are in the folder of the clean data.
        OutputError: the folder for attachments cannot be written, or the store cannot be used.

    Example:
        >>> with Scanner("clean_images/", detectors="lipschitz", store="scans.db") as scanner:
        ...     for result in scanner.scan_many(["model.pth", "model.pth"]):
        ...         print(result.verdict, scanner.taken)
        inconclusive 0
        inconclusive 1
    """

    def __init__(
        self,
        data: DataSource = None,
        *,
        detectors: Sequence[str | Detector] | str | None = None,
        timeout: float | None = None,
        stack: int | str | StackOptions = "auto",
        attachments: Folder = None,
        **options: Unpack[ScanNames],
    ) -> None:
        store = options.pop("store", None)
        if written := [one for one in (attachments, store.path if isinstance(store, Store) else store) if one]:
            check_apart(data, written)
        run = _run_options(stack if isinstance(stack, StackOptions) else StackOptions(stack), timeout, options)
        self._job = _job(data, detectors, options)
        self._job.keeps = attachments is not None
        self._executor = run.make(parse_device(self._job.options.device))
        self._is_inline, self._pickles = run.kind == "inline", run.kind == "processes"
        self._folder = None if attachments is None else attachments_folder(attachments)
        self._taken, self._lock = 0, threading.Lock()
        self._own = store is not None and not isinstance(store, Store)
        self._store = store if store is None or isinstance(store, Store) else Store(store)
        self._stored = None if self._store is None else StoredScans(self._store, self._job, data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the store, unless it was given open."""
        if self._own and self._store is not None:
            self._store.close()

    @property
    def taken(self) -> int:
        """How many results came from the store so far."""
        return self._taken

    def scan(self, model: ModelSource, progress: Progress | None = None) -> Result:
        """The result of one model; of several sets of weights in a file, the most serious result.

        Raises:
            StoreError: the store cannot be read or written.
        """
        return min(
            self.scan_many([model], progress), key=lambda one: (ATTENTION.index(one.verdict), -(one.risk or 0.0))
        )

    def scan_many(
        self, models: Iterable[ModelSource], progress: Progress | None = None
    ) -> Generator[Result, None, None]:
        """Yields one result for every set of weights, in order. Closing it ends the processes that scan.

        Args:
            models: paths, modules and loaded models.
            progress: called with a short text before each stage.

        Raises:
            OptionError: one path was given instead of several.
            StoreError: the store cannot be read or written, or the clean data changed during the scan.
        """
        if isinstance(models, str | os.PathLike):
            raise OptionError(f"{models} is one path, and several models were expected.", "Give a list, or use scan.")
        progress, random, remotes = progress or silent, CallersRandom(), list[RemoteModels]()
        given = random.models(iter(models)) if self._is_inline else models
        outcomes = self._outcomes(self._found(given, progress, remotes), progress)
        for one in random.outcomes(outcomes) if self._is_inline else outcomes:
            result = remotes[0].explained(one.result) if remotes else one.result
            if self._folder is None:
                yield result
            else:
                yield with_saved_attachments(result, one.attachments, self._folder)

    def _found(
        self, models: Iterable[object], progress: Progress, remotes: list[RemoteModels]
    ) -> Iterator[ModelSource]:
        """The same models, with downloaded files in place of repositories on the Hub."""
        for model in models:
            if is_local(model):
                yield model
                continue
            if not remotes:
                remotes.append(RemoteModels(self._job.options.max_download, progress))
            yield from remotes[0].sources(model)

    def _outcomes(self, models: Iterable[ModelSource], progress: Progress) -> Iterator[Outcome]:
        if self._stored is None:
            for _, outcome in in_order(self._executor.run(models, self._job, progress)):
                yield outcome
            return
        for one in self._stored.outcomes(self._executor, models, progress):
            if one.taken:
                with self._lock:
                    self._taken += 1
            yield one.outcome


def _job(data: DataSource, detectors: Sequence[str | Detector] | str | None, options: ScanNames) -> Job:
    """The settings that all models share, checked before the first model is loaded."""
    loading: dict[str, Any] = dict(options)
    limit = parse_budget(loading.pop("budget", None))
    path = loading.pop("calibration", None)
    table = None if path is None and detectors is not None else table_for(limit.level, path)  # chosen ones have none
    known = options_from(loading, "scan")
    known.check()
    every = chosen_detectors(detectors, {"seed": known.seed, "precision": known.precision})
    clean = CleanSource(data, known)
    if detectors is not None:
        return Job(clean, every, known, budget=limit, calibration=table)
    regular = [one for one in every if one.level]  # the others run only by name
    reached = LEVELS[: LEVELS.index(limit.level) + 1]
    chosen = [one for one in regular if one.level in reached]
    beyond = [one.id for one in regular if one not in chosen]
    return Job(clean, chosen, known, unusable("detector"), limit, beyond, stops=True, calibration=table)


def _run_options(stack: StackOptions, timeout: float | None, options: ScanNames) -> RunOptions:
    """Where models run; it takes these keywords out of ``options``."""
    return RunOptions(
        stack,
        options.pop("executor", "auto"),
        options.pop("workers", None),
        timeout,
        options.pop("memory_limit", None),
        options.pop("address", None),
    )
