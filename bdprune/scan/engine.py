"""Scanning: take in a model and clean data, check that they fit, run the detectors, judge."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bdprune.data.clean import CleanData
from bdprune.data.sanity import Sanity, check_sanity
from bdprune.detect.base import Detector, Evidence
from bdprune.errors import BdpruneError, OptionError
from bdprune.model.handle import Model
from bdprune.scan import registry
from bdprune.scan.describe import (
    artifact_info,
    data_info,
    detector_result,
    env,
    error_info,
    model_info,
    unread_artifact,
)
from bdprune.scan.device import parse_device
from bdprune.scan.intake import DataShelf, DataSource, ModelOptions, ModelSource, take_model
from bdprune.scan.judge import judge
from bdprune.scan.result import Finding, Result

Progress = Callable[[str], None]
"""Told what happens next to the model at hand: ``loading``, ``checking the clean data``, or a detector's id."""

LONGEST_TIMEOUT = 1_000_000
"""Seconds; much more does not fit into what the system waits with."""

log = logging.getLogger(__name__)


def scan(
    model: ModelSource,
    data: DataSource = None,
    *,
    detectors: Sequence[str | Detector] | None = None,
    per_class: int | None = None,
    timeout: float | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Verdict on one model. Bad files and bad data give the verdict ``error``, never an exception.

    Args:
        model: path of a checkpoint, a module, or what ``bdprune.load`` gave.
        data: labelled clean images: a class-per-folder tree, an ``.npz`` or parquet file, a torch Dataset or
            ``CleanData``. Without any, only data-free detectors run and the verdict is never ``clean``.
        detectors: names of detectors, or detectors; None runs all there are.
        per_class: at most so many clean images of each class; None takes all.
        timeout: seconds after which the scan is given up with the verdict ``error``; it then runs in a process of its
            own, so a script that uses it needs the usual ``if __name__ == "__main__":``.
        progress: called with a word on what happens next.
        **options: ``arch``, ``num_classes``, ``input_shape``, ``normalize``, ``device`` (``cpu``) and ``seed`` (0), as
            in ``ModelOptions``.

    Raises:
        OptionError: an option that cannot work; nothing was scanned.

    Example:
        >>> result = scan("model.pth", "clean_images/", per_class=10, detectors=["lipschitz"])
        >>> result.data.count, result.data.clean_accuracy, [detector.id for detector in result.detectors]
        (30, 1.0, ['bdprune.lipschitz'])
        >>> scan("missing.pth").error.message
        'Cannot load missing.pth: No such file or directory.'
    """
    job = _job(data, detectors, per_class, options)
    with ExitStack() as stack:
        return _runner(job, timeout, stack)(model, progress or silent)


def scan_many(
    paths: Iterable[ModelSource],
    data: DataSource = None,
    *,
    detectors: Sequence[str | Detector] | None = None,
    per_class: int | None = None,
    timeout: float | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Iterator[Result]:
    """One result a model, in order, as they come; a model that fails does not stop the others.

    The clean data is read once. Arguments and errors are those of ``scan``; ``timeout`` counts for each model. An
    unexpected exception also becomes a verdict ``error``.
    """
    job = _job(data, detectors, per_class, options)
    return _results(paths, job, timeout, progress or silent)


def _results(paths: Iterable[ModelSource], job: Job, timeout: float | None, progress: Progress) -> Iterator[Result]:
    with ExitStack() as stack:
        run = _runner(job, timeout, stack)
        for path in paths:
            yield _survive(run, path, job, progress)


def _survive(
    run: Callable[[ModelSource, Progress], Result], source: ModelSource, job: Job, progress: Progress
) -> Result:
    """What ``run`` makes of one model; a bug that it hits is the result of this model, not the end of the others."""
    clock = Clock()
    try:
        return run(source, progress)
    except OptionError:
        raise
    except Exception as error:
        log.debug("unexpected error in %s", source, exc_info=True)
        return failure(source, error, job, clock)


@dataclass
class Job:
    """What is the same for every model of a run; it can be sent to another process."""

    shelf: DataShelf
    detectors: Sequence[str | Detector] | None
    options: ModelOptions
    threads: int = field(default_factory=torch.get_num_threads)


@dataclass
class Clock:
    """When something began, and the seconds since."""

    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Wall time since it was made."""
        return time.perf_counter() - self.start


def silent(stage: str) -> None:
    """A progress that tells nobody."""


def _job(
    data: DataSource, detectors: Sequence[str | Detector] | None, per_class: int | None, options: dict[str, Any]
) -> Job:
    try:
        known = ModelOptions(**options)
    except TypeError as error:
        raise TypeError(f"scan got an unknown option: {error}") from None
    parse_device(known.device)
    known.normalization()
    registry.detectors(detectors, known.seed)
    return Job(DataShelf(data, per_class, known.seed), detectors, known)


def _runner(job: Job, timeout: float | None, stack: ExitStack) -> Callable[[ModelSource, Progress], Result]:
    if timeout is None:
        return lambda model, progress: scan_one(model, job, progress)
    from bdprune.scan.worker import Worker

    if not 0 < timeout <= LONGEST_TIMEOUT:
        raise OptionError(
            f"A timeout of {timeout:g} seconds cannot be kept.",
            f"Give seconds, more than 0 and up to {LONGEST_TIMEOUT}.",
        )
    worker = stack.enter_context(Worker(job, timeout))
    return worker.scan


def scan_one(source: ModelSource, job: Job, progress: Progress) -> Result:
    """Scans one model in this process."""
    clock = Clock()
    model: Model | None = None
    try:
        progress("loading")
        model = take_model(source, job.options)
        data = job.shelf.fit_for(model)
        return _examine(model, data, job, progress, clock)
    except OptionError:
        raise
    except BdpruneError as error:
        return failure(source, error, job, clock, model)


def _examine(model: Model, data: CleanData | None, job: Job, progress: Progress, clock: Clock) -> Result:
    sanity: Sanity | None = None
    if data is not None:
        progress("checking the clean data")
        sanity = check_sanity(model, data)
    usable = data if sanity is not None and sanity.ok else None
    chosen = registry.detectors(job.detectors, job.options.seed)
    left_out = [detector.id for detector in chosen if detector.needs_data and usable is None]
    evidence = [
        _run(detector, model, usable, progress) for detector in chosen if usable is not None or not detector.needs_data
    ]
    judgement = judge(evidence, sanity)
    return Result(
        started=clock.started,
        verdict=judgement.verdict,
        risk=judgement.risk,
        target_label=judgement.target_label,
        artifact=artifact_info(model),
        model=model_info(model),
        detectors=tuple(map(detector_result, evidence)),
        findings=(*judgement.findings, *_unchecked(left_out)),
        data=data_info(data, sanity) if data is not None else None,
        env=env(model.device, job.options.seed),
        seconds=clock.seconds,
    )


def _run(detector: Detector, model: Model, data: CleanData | None, progress: Progress) -> Evidence:
    """What the detector saw; one that broke down saw nothing, and says why in its details."""
    progress(detector.id)
    start = time.perf_counter()
    try:
        return detector(model, data)
    except OptionError:
        raise
    except BdpruneError as error:
        nothing = float("nan")
        seconds = time.perf_counter() - start
        return Evidence(detector.id, nothing, nothing, False, seconds=seconds, details={"error": str(error)})


def _unchecked(left_out: Sequence[str]) -> tuple[Finding, ...]:
    if not left_out:
        return ()
    message = f"Not run for want of usable clean data: {', '.join(left_out)}."
    return (Finding(rule_id="BD000", severity="info", message=message),)


def failure(
    source: ModelSource, error: Exception, job: Job, clock: Clock | None = None, model: Model | None = None
) -> Result:
    """The result of a model that could not be scanned."""
    clock = clock or Clock()
    return Result(
        started=clock.started,
        verdict="error",
        risk=None,
        target_label=None,
        artifact=None if isinstance(source, Model | torch.nn.Module) else unread_artifact(Path(source)),
        model=model_info(model) if model else None,
        data=None,
        env=env(parse_device(job.options.device), job.options.seed),
        seconds=clock.seconds,
        error=error_info(error),
    )
