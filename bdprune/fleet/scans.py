"""Scanning one model or many: options are checked once, and an executor runs each model through the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from bdprune.data import ClassOrder
from bdprune.errors import OptionError
from bdprune.fleet.executors.process import Worker
from bdprune.fleet.executors.stack import StackedScan, StackOptions
from bdprune.methods import Detector, split_names
from bdprune.methods import detectors as make_detectors
from bdprune.pipeline import DataShelf, DataSource, Job, ModelSource, Progress, options_from, scan_one, silent, survive
from bdprune.record import ATTENTION, Result
from bdprune.runtime import Precision, check_precision

LONGEST_TIMEOUT = 1_000_000
"""Seconds; much more does not fit into what the system waits with."""


def scan(
    model: ModelSource,
    data: DataSource = None,
    *,
    detectors: Sequence[str | Detector] | str | None = None,
    per_class: int | None = None,
    precision: Precision | None = None,
    timeout: float | None = None,
    class_order: ClassOrder = None,
    skip_unknown: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Verdict on one model. Bad files and bad data give the verdict ``error``, never an exception.

    Where a file holds several sets of weights, each is scanned, and the result that needs attention most comes back;
    ``scan_many`` gives all of them.

    Args:
        model: path of a checkpoint, a module, or what ``bdprune.load`` gave.
        data: labelled clean images: a class-per-folder tree, an ``.npz`` or parquet file, a torch Dataset or
            ``CleanData``. Without any, only data-free detectors run and the verdict is never ``clean``.
        detectors: names of detectors, or detectors, or names with commas between; None runs all there are.
        per_class: at most so many clean images of each class; None takes all.
        precision: of detectors that train, where they are given by name: ``winograd``, ``float32``, ``bfloat16`` or
            ``auto`` (:func:`bdprune.runtime.precision.plan_for`); None is their default.
        timeout: seconds after which the scan is given up with the verdict ``error``; it then runs in a process of its
            own, so a script that uses it needs the usual ``if __name__ == "__main__":``.
        progress: called with a word on what happens next.
        class_order: how labels of the data become labels of the model: ``number`` (as they are), ``text`` (numbered
            folders in text order, as ImageFolder numbers them), or a map, or the path of a JSON file with one.
        skip_unknown: let weights that could not be scanned not stand against the verdict ``clean``.
        **options: ``arch``, ``num_classes``, ``input_shape``, ``normalize``, ``device`` (``cpu``), ``seed`` (0) and
            ``state_key``, as in ``ModelOptions``.

    Raises:
        OptionError: an option that can work with no model; nothing was scanned.

    Example:
        >>> result = scan("model.pth", "clean_images/", per_class=10, detectors=["lipschitz"])
        >>> result.data.count, result.data.clean_accuracy, [detector.id for detector in result.detectors]
        (30, 1.0, ['bdprune.lipschitz'])
        >>> scan("missing.pth").error.message
        'Cannot load missing.pth: No such file or directory.'
    """
    job = _job(data, detectors, per_class, precision, class_order, skip_unknown, options)
    with ExitStack() as stack:
        results = _runner(job, timeout, stack)(model, progress or silent)
    return min(results, key=_attention)


def scan_many(
    paths: Iterable[ModelSource],
    data: DataSource = None,
    *,
    detectors: Sequence[str | Detector] | str | None = None,
    per_class: int | None = None,
    precision: Precision | None = None,
    timeout: float | None = None,
    stack: int | str = "auto",
    stack_memory: int | None = None,
    class_order: ClassOrder = None,
    skip_unknown: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Iterator[Result]:
    """One result for every set of weights, in order, as they come; a model that fails does not stop the others.

    The clean data is read once. Arguments and errors are those of ``scan``; ``timeout`` counts for each file. An
    unexpected exception also becomes a verdict ``error``, and so does an option that cannot work with one model.

    Args:
        stack: how many models of one architecture are scanned in the same steps at most (``fleet.executors.stack``);
            1 takes one after another, ``auto`` fills stacks where a short trial finds that faster. With ``timeout``
            every model has a process of its own, and there are no stacks.
        stack_memory: bytes that stacks may take; None takes half of what is free on the device.
    """
    job = _job(data, detectors, per_class, precision, class_order, skip_unknown, options)
    stacking = StackOptions(stack, stack_memory)
    if timeout is not None and stacking.size not in ("auto", 1):
        raise OptionError(
            "A time limit takes a process for every model, and models in a stack share one.",
            "Leave out --timeout or --stack.",
        )
    return _results(paths, job, timeout, stacking, progress or silent)


def _results(
    paths: Iterable[ModelSource], job: Job, timeout: float | None, stacking: StackOptions, progress: Progress
) -> Iterator[Result]:
    if timeout is None:
        yield from StackedScan(job, stacking, progress).results(paths)
        return
    with ExitStack() as stack:
        run = _runner(job, timeout, stack)
        for path in paths:
            found = survive(partial(run, path, progress), path, job)
            yield from [found] if isinstance(found, Result) else found


def _job(
    data: DataSource,
    detectors: Sequence[str | Detector] | str | None,
    per_class: int | None,
    precision: Precision | None,
    class_order: ClassOrder,
    skip_unknown: bool,
    options: dict[str, Any],
) -> Job:
    """All that holds for every model, checked before the first one is loaded."""
    known = options_from(options, "scan")
    known.check()
    if precision is not None:
        check_precision(precision)
    if isinstance(detectors, str):
        detectors = split_names(detectors)
    make_detectors(detectors, known.seed, precision)
    shelf = DataShelf(data, per_class, known.seed, class_order, fixed_size=known.input_shape is not None)
    return Job(shelf, detectors, known, precision, skip_unknown)


def _runner(job: Job, timeout: float | None, stack: ExitStack) -> Callable[[ModelSource, Progress], list[Result]]:
    if timeout is None:
        return lambda model, progress: scan_one(model, job, progress)
    if not 0 < timeout <= LONGEST_TIMEOUT:
        raise OptionError(
            f"A timeout of {timeout:g} seconds cannot be kept.",
            f"Give seconds, more than 0 and up to {LONGEST_TIMEOUT}.",
        )
    worker = stack.enter_context(Worker(job, timeout))
    return worker.scan


def _attention(result: Result) -> tuple[int, float]:
    """Sorts results by how much attention they need, the most first."""
    return ATTENTION.index(result.verdict), -(result.risk or 0.0)
