"""One model in one straight line: load it, check it against the clean data, run the detectors, judge."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import torch

from bdprune.analysis import Sanity, check_sanity
from bdprune.data import CleanData
from bdprune.errors import BdpruneError
from bdprune.methods import Detector, Evidence
from bdprune.methods import detectors as make_detectors
from bdprune.model import Loaded, Model, Unloaded
from bdprune.pipeline.describe import (
    artifact_info,
    data_info,
    detector_result,
    env,
    error_info,
    model_info,
    unread_artifact,
    weight_coverage,
)
from bdprune.pipeline.device import parse_device
from bdprune.pipeline.open import DataShelf, ModelOptions, ModelSource, take_models
from bdprune.record import ArtifactInfo, Finding, Result, Severity, WeightCoverage, some
from bdprune.runtime import Precision
from bdprune.verdict import judge

Progress = Callable[[str], None]
"""Told what happens next to the model at hand: ``loading``, ``checking the clean data``, or a detector's id."""

log = logging.getLogger(__name__)

_Done = TypeVar("_Done")


def survive(run: Callable[[], _Done], source: ModelSource, job: Job, model: Model | None = None) -> _Done | Result:
    """What ``run`` makes of one model; an error of any kind is the result of this model, not the end of the others."""
    clock = Clock()
    try:
        return run()
    except Exception as error:
        log.debug("unexpected error in %s", source, exc_info=True)
        return failure(source, error, job, clock, model)


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
    return survive(partial(examine, candidate, job, progress), source, job, candidate.model)


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
            data = data.by_content  # so that nothing hangs on the order in which the images came
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
    return make_detectors(job.detectors, job.options.seed, job.precision)


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
