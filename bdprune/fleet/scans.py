"""Scanning one model or many: options are checked once, and an executor takes each model through the pipeline."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Unpack

from bdprune.fleet.executors.inline import Executor, InlineExecutor
from bdprune.fleet.executors.process import ProcessExecutor, check_sendable
from bdprune.fleet.executors.stack import StackExecutor, StackOptions
from bdprune.methods import Detector
from bdprune.pipeline import (
    CleanSource,
    DataSource,
    Job,
    ModelSource,
    OptionNames,
    Progress,
    attachments_folder,
    options_from,
    silent,
    with_saved_attachments,
)
from bdprune.record import ATTENTION, Result
from bdprune.registry import chosen_detectors, unusable

Folder = str | os.PathLike[str] | None


def scan(
    model: ModelSource,
    data: DataSource = None,
    *,
    detectors: Sequence[str | Detector] | str | None = None,
    timeout: float | None = None,
    attachments: Folder = None,
    progress: Progress | None = None,
    **options: Unpack[OptionNames],
) -> Result:
    """Verdict on one model. Bad files and bad data give the verdict ``error``, never an exception.

    Where a file holds several sets of weights, each is scanned, and the result that needs attention most comes back;
    ``scan_many`` gives all of them.

    Args:
        model: path of a checkpoint, a module, or what ``bdprune.load`` gave.
        data: labelled clean images: a class-per-folder tree, an ``.npz`` or parquet file, a torch Dataset or
            ``CleanData``. Without any, only data-free detectors run and the verdict is never ``clean``.
        detectors: names of detectors, or detectors, or names with commas between; None runs all there are, the cheapest
            first.
        timeout: seconds after which the scan is given up with the verdict ``error``; it then runs in a process of its
            own, so a script that uses it needs the usual ``if __name__ == "__main__":``.
        attachments: folder for the tensors and pictures that detectors give, such as a trigger; None writes none.
        progress: called with a word on what happens next.
        **options: ``arch``, ``num_classes``, ``input_shape``, ``normalize``, ``device`` (``cpu``), ``seed`` (0),
            ``state_key``, ``per_class``, ``class_order``, ``precision`` and ``skip_unknown``, as in ``Options``.

    Raises:
        OptionError: an option that can work with no model; nothing was scanned.
        OutputError: the folder for attachments cannot be written.

    Example:
        >>> result = scan("model.pth", "clean_images/", per_class=10, detectors=["lipschitz"])
        >>> result.data.count, result.data.clean_accuracy, [one.detector for one in result.detectors]
        (30, 1.0, ['bdprune.lipschitz'])
        >>> scan("missing.pth").error.message
        'Cannot load missing.pth: No such file or directory.'
    """
    if timeout is not None:
        check_sendable(model)
    run = _run([model], _job(data, detectors, options), timeout, None, progress or silent, attachments)
    return min(run, key=lambda one: (ATTENTION.index(one.verdict), -(one.risk or 0.0)))


def scan_many(
    models: Iterable[ModelSource],
    data: DataSource = None,
    *,
    detectors: Sequence[str | Detector] | str | None = None,
    timeout: float | None = None,
    stack: int | str | StackOptions = "auto",
    attachments: Folder = None,
    progress: Progress | None = None,
    **options: Unpack[OptionNames],
) -> Iterator[Result]:
    """One result for every set of weights, in order, as they come; a model that fails does not stop the others.

    The clean data is read once. Arguments and errors are those of ``scan``; ``timeout`` counts for each model. An
    unexpected exception also becomes a verdict ``error``, and so does an option that cannot work with one model.

    Args:
        stack: how many models of one architecture are scanned in the same steps at most; 1 takes one after another,
            ``auto`` fills stacks where a short trial finds that faster. ``StackOptions`` also says what memory they may
            take. With a time limit, a stack may take as long as its models one after another.
    """
    stacks = stack if isinstance(stack, StackOptions) else StackOptions(stack)
    return _run(models, _job(data, detectors, options), timeout, stacks, progress or silent, attachments)


def _job(data: DataSource, detectors: Sequence[str | Detector] | str | None, options: OptionNames) -> Job:
    """All that holds for every model, checked before the first one is loaded."""
    known = options_from(options, "scan")
    known.check()
    chosen = chosen_detectors(detectors, {"seed": known.seed, "precision": known.precision})
    broken = unusable("detector") if detectors is None else {}
    return Job(CleanSource(data, known), chosen, known, broken)


def _run(
    models: Iterable[ModelSource],
    job: Job,
    timeout: float | None,
    stacks: StackOptions | None,
    progress: Progress,
    attachments: Folder,
) -> Iterator[Result]:
    """The executor for this run is made at once, so that what cannot work is said before anything is scanned."""
    executor: Executor = StackExecutor(stacks) if stacks and stacks.size != 1 else InlineExecutor()
    if timeout is not None:
        executor = ProcessExecutor(executor, timeout)
    job.keeps = attachments is not None
    outcomes = (one for _, one in executor.run(models, job, progress))
    if attachments is None:
        return (one.result for one in outcomes)
    folder = attachments_folder(attachments)
    return (with_saved_attachments(one.result, one.attachments, folder) for one in outcomes)
