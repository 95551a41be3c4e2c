"""Scanning: take in a model and clean data, check that they fit, run the detectors, judge."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import torch

from bdprune.data.clean import ClassOrder, CleanData
from bdprune.data.order import read_order
from bdprune.data.sanity import Sanity, check_sanity
from bdprune.detect.base import Detector, Evidence
from bdprune.errors import BdpruneError, OptionError
from bdprune.model.handle import Model
from bdprune.model.load import Loaded, Unloaded
from bdprune.scan import registry
from bdprune.scan.describe import (
    artifact_info,
    data_info,
    detector_result,
    env,
    error_info,
    model_info,
    unread_artifact,
    weight_coverage,
)
from bdprune.scan.device import parse_device
from bdprune.scan.intake import DataShelf, DataSource, ModelOptions, ModelSource, take_models
from bdprune.scan.judge import judge
from bdprune.scan.result import ATTENTION, ArtifactInfo, Finding, Result, Severity, WeightCoverage, some
from bdprune.training.precision import Precision, check_precision

if TYPE_CHECKING:
    from bdprune.scan.stacks import StackOptions

Progress = Callable[[str], None]
"""Told what happens next to the model at hand: ``loading``, ``checking the clean data``, or a detector's id."""

LONGEST_TIMEOUT = 1_000_000
"""Seconds; much more does not fit into what the system waits with."""

log = logging.getLogger(__name__)

_Done = TypeVar("_Done")


def scan(
    model: ModelSource,
    data: DataSource = None,
    *,
    detectors: Sequence[str | Detector] | None = None,
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
        detectors: names of detectors, or detectors; None runs all there are.
        per_class: at most so many clean images of each class; None takes all.
        precision: of detectors that train, where they are given by name: ``winograd``, ``float32``, ``bfloat16`` or
            ``auto`` (:func:`bdprune.training.precision.plan_for`); None is their default.
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
    detectors: Sequence[str | Detector] | None = None,
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
        stack: how many models of one architecture are scanned in the same steps at most (:mod:`bdprune.scan.stacks`);
            1 takes one after another, ``auto`` fills stacks where a short trial finds that faster. With ``timeout``
            every model has a process of its own, and there are no stacks.
        stack_memory: bytes that stacks may take; None takes half of what is free on the device.
    """
    from bdprune.scan.stacks import StackOptions

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
        from bdprune.scan.stacks import StackedScan

        yield from StackedScan(job, stacking, progress).results(paths)
        return
    with ExitStack() as stack:
        run = _runner(job, timeout, stack)
        for path in paths:
            found = survive(partial(run, path, progress), path, job)
            yield from [found] if isinstance(found, Result) else found


def survive(run: Callable[[], _Done], source: ModelSource, job: Job) -> _Done | Result:
    """What ``run`` makes of one model; an error of any kind is the result of this model, not the end of the others."""
    clock = Clock()
    try:
        return run()
    except Exception as error:
        log.debug("unexpected error in %s", source, exc_info=True)
        return failure(source, error, job, clock)


@dataclass
class Job:
    """What is the same for every model of a run; it can be sent to another process."""

    shelf: DataShelf
    detectors: Sequence[str | Detector] | None
    options: ModelOptions
    precision: Precision | None = None
    skip_unknown: bool = False
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
    data: DataSource,
    detectors: Sequence[str | Detector] | None,
    per_class: int | None,
    precision: Precision | None,
    class_order: ClassOrder,
    skip_unknown: bool,
    options: dict[str, Any],
) -> Job:
    """All that holds for every model, checked before the first one is loaded."""
    try:
        known = ModelOptions(**options)
    except TypeError as error:
        raise TypeError(f"scan got an unknown option: {error}") from None
    known.check()
    read_order(class_order)
    if per_class is not None and per_class < 1:
        raise OptionError(f"{per_class} images per class is too few.", "Give --per-class 1 or more.")
    if precision is not None:
        check_precision(precision)
    registry.detectors(detectors, known.seed, precision)
    shelf = DataShelf(data, per_class, known.seed, class_order, fixed_size=known.input_shape is not None)
    return Job(shelf, detectors, known, precision, skip_unknown)


def _runner(job: Job, timeout: float | None, stack: ExitStack) -> Callable[[ModelSource, Progress], list[Result]]:
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


def _attention(result: Result) -> tuple[int, float]:
    """Sorts results by how much attention they need, the most first."""
    return ATTENTION.index(result.verdict), -(result.risk or 0.0)


@dataclass(frozen=True)
class Candidate:
    """A model that was taken in, and how it does on the clean data.

    Attributes:
        data: the clean images; None for a run without.
        sanity: how the model does on them; None without any.
        started: when it was taken in.
        seconds: wall time that took.
    """

    model: Model
    data: CleanData | None
    sanity: Sanity | None
    started: str
    seconds: float

    @property
    def usable(self) -> CleanData | None:
        """The clean images, if the model does its clean job on them."""
        return self.data if self.sanity is not None and self.sanity.ok else None


def scan_one(source: ModelSource, job: Job, progress: Progress) -> list[Result]:
    """Scans one file in this process: a result for each of its sets of weights."""
    results = []
    for one in take_in(source, job, progress):
        results.append(one if isinstance(one, Result) else _examined(one, source, job, progress))
    return results


def _examined(candidate: Candidate, source: ModelSource, job: Job, progress: Progress) -> Result:
    return survive(partial(examine, candidate, job, progress), source, job)


def take_in(source: ModelSource, job: Job, progress: Progress) -> list[Candidate | Result]:
    """Every set of weights with the clean data that fits it; a result in place of what cannot be scanned."""
    clock = Clock()
    try:
        progress("loading")
        loaded = take_models(source, job.options)
    except BdpruneError as error:
        return [failure(source, error, job, clock)]
    found = [_with_data(model, source, job, progress) for model in loaded.models]
    if not job.skip_unknown:
        found += [_not_checked(one, loaded, job) for one in loaded.unloaded]
    return found


def _with_data(model: Model, source: ModelSource, job: Job, progress: Progress) -> Candidate | Result:
    """The model and the clean data, checked against each other; a result where they do not fit."""
    clock = Clock()
    try:
        fitted, data = job.shelf.fit_for(model)
        sanity: Sanity | None = None
        if data is not None:
            progress("checking the clean data")
            sanity = check_sanity(fitted, data)
        return Candidate(fitted, data, sanity, clock.started, clock.seconds)
    except BdpruneError as error:
        return failure(source, error, job, clock, model)


def _not_checked(one: Unloaded, loaded: Loaded, job: Job) -> Result:
    """The result for a set of weights beside a model that was loaded."""
    model = loaded.models[0]
    info = artifact_info(model)
    assert info is not None
    hint = f" {one.error.mend}" if one.error.mend else ""
    message = f"These weights were not checked: {one.error.message}{hint}"
    return Result(
        started=Clock().started,
        verdict="inconclusive",
        risk=None,
        target_label=None,
        artifact=msgspec.structs.replace(info, state_key=one.name, prefix=None),
        model=None,
        data=None,
        env=env(model.device, job.options.seed),
        seconds=0.0,
        findings=(Finding(rule_id="BD001", severity="medium", message=message),),
    )


def detectors_for(candidate: Candidate, job: Job) -> list[Detector]:
    """The detectors that run on this model: without usable clean data only those that need none."""
    return [one for one in _chosen(job) if candidate.usable is not None or not one.needs_data]


def examine(candidate: Candidate, job: Job, progress: Progress, known: Mapping[int, Evidence] | None = None) -> Result:
    """Runs the detectors and judges.

    Args:
        known: evidence that there is already, by the detector's place in :func:`detectors_for`.
    """
    clock, known = Clock(), known or {}
    running = detectors_for(candidate, job)
    left_out = [one.id for one in _chosen(job) if candidate.usable is None and one.needs_data]
    evidence = [
        known[place] if place in known else _run(detector, candidate, progress)
        for place, detector in enumerate(running)
    ]
    judgement = judge(evidence, candidate.sanity)
    model, data, coverage = candidate.model, candidate.data, weight_coverage(candidate.model)
    unscanned = coverage.unscanned if coverage and not job.skip_unknown else ()
    return Result(
        started=candidate.started,
        verdict="inconclusive" if judgement.verdict == "clean" and unscanned else judgement.verdict,
        risk=judgement.risk,
        target_label=judgement.target_label,
        artifact=artifact_info(model),
        model=model_info(model),
        detectors=tuple(map(detector_result, evidence)),
        findings=(*judgement.findings, *_unchecked(left_out), *_not_scanned(coverage)),
        data=data_info(data, candidate.sanity) if data is not None else None,
        env=env(model.device, job.options.seed),
        seconds=candidate.seconds + sum(one.seconds for one in known.values()) + clock.seconds,
        coverage=coverage,
        not_run=tuple(left_out),
    )


def _chosen(job: Job) -> list[Detector]:
    return registry.detectors(job.detectors, job.options.seed, job.precision)


def _run(detector: Detector, candidate: Candidate, progress: Progress) -> Evidence:
    """What the detector saw; one that broke down saw nothing."""
    progress(detector.id)
    clock = Clock()
    try:
        return detector(candidate.model, candidate.usable)
    except BdpruneError as error:
        return nothing_seen(detector, error, clock.seconds)


def nothing_seen(detector: Detector, error: BdpruneError, seconds: float) -> Evidence:
    """The evidence of a detector that broke down: it says why in its details."""
    nothing = float("nan")
    return Evidence(detector.id, nothing, nothing, False, seconds=seconds, details={"error": str(error)})


def _unchecked(left_out: Sequence[str]) -> tuple[Finding, ...]:
    if not left_out:
        return ()
    message = f"Not run for want of usable clean data: {', '.join(left_out)}."
    return (Finding(rule_id="BD000", severity="info", message=message),)


def _not_scanned(coverage: WeightCoverage | None) -> tuple[Finding, ...]:
    """What the file holds beside the weights that were scanned."""
    if coverage is None or not (coverage.unscanned or coverage.left_out):
        return ()
    parts = [f"weights that belong to no network that was recognised: {some(coverage.unscanned)}"]
    others = [f"other sets of weights: {some(coverage.left_out)}"]
    told = (parts if coverage.unscanned else []) + (others if coverage.left_out else [])
    severity: Severity = "medium" if coverage.unscanned else "info"
    return (Finding(rule_id="BD001", severity=severity, message=f"Not scanned: {'; '.join(told)}."),)


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
        artifact=_artifact_of(source, model),
        model=model_info(model) if model else None,
        data=None,
        env=env(parse_device(job.options.device), job.options.seed),
        seconds=clock.seconds,
        error=error_info(error),
    )


def _artifact_of(source: ModelSource, model: Model | None) -> ArtifactInfo | None:
    if model is not None:
        return artifact_info(model)
    return None if isinstance(source, Model | torch.nn.Module) else unread_artifact(Path(source))
