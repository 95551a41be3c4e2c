"""Scans one model: opens it, checks it on the clean data, runs the detectors, and judges."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

import msgspec
import torch
from torch import Tensor

from bdprune.analysis import Case, Sanity, check_sanity
from bdprune.data import CleanData
from bdprune.errors import BdpruneError
from bdprune.methods import Detector, Method
from bdprune.model import Loaded, Model, Unloaded
from bdprune.pipeline.describe import (
    artifact_info,
    data_info,
    env,
    error_info,
    model_info,
    unread_artifact,
    weight_coverage,
)
from bdprune.pipeline.examination import Examination, Recall
from bdprune.pipeline.open import CleanSource, ModelSource, Options, load_models, parse_device
from bdprune.record import CalibrationInfo, Evidence, Finding, Result, Severity, WeightCoverage, some
from bdprune.runtime import Budget, plain_torch
from bdprune.verdict import MOVED_FILTERS, NOT_JUDGED, NOT_SCANNED, Calibration, Judgement, with_p_value

Progress = Callable[[str], None]
"""Called with the next stage of the current model, such as ``loading`` or ``running detector unlearning (2 of 3)``."""

log = logging.getLogger(__name__)

_Done = TypeVar("_Done")


@dataclass
class Job:
    """The settings that all models of a run share; it can be sent to another process.

    Attributes:
        clean: where the clean data comes from.
        detectors: the detectors to run, in order.
        options: how to load and compute.
        broken: plug-ins that cannot be made, with reasons.
        budget: how far the scan of each model goes.
        beyond: ids of the detectors that a larger budget would run.
        stops: whether the scan of a model ends once its verdict is sure.
        keeps: whether to keep large attachments.
        calibration: the table that turns the evidence into a probability; None has none.
        recall: gives the evidence of earlier scans; None runs every detector.
        threads: threads of torch.
    """

    clean: CleanSource
    detectors: Sequence[Detector]
    options: Options
    broken: Mapping[str, str] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)
    beyond: Sequence[str] = ()
    stops: bool = False
    keeps: bool = False
    calibration: Calibration | None = None
    recall: Recall | None = None
    threads: int = field(default_factory=torch.get_num_threads)


@dataclass(frozen=True)
class Outcome:
    """The result of one model.

    Attributes:
        result: of one set of weights.
        attachments: bytes by their SHA-256.
        sets: number of outcomes of the same file; they follow one another.
    """

    result: Result
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    sets: int = 1


@dataclass
class Clock:
    """A start time, and the seconds since then."""

    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Wall time since the start."""
        return time.perf_counter() - self.start


def silent(stage: str) -> None:
    """A progress callback that does nothing."""


def short_id(method: Method) -> str:
    """The id of a method as people read it: without the package for bdprune's own methods."""
    return method.id.removeprefix("bdprune.")


@dataclass(frozen=True)
class Opened:
    """An opened model, and its check on the clean data.

    Attributes:
        case: the model, with the clean images if it passes the check on them.
        data: the clean images; None for a run without data.
        sanity: the check on the clean images; None without data.
        clock: started before opening.
        seconds: wall time of opening.
    """

    case: Case
    data: CleanData | None
    sanity: Sanity | None
    clock: Clock
    seconds: float


def scan_one(source: ModelSource, job: Job, progress: Progress) -> list[Outcome]:
    """Scans one file in this process, with one outcome for each set of weights."""
    opened = open_cases(source, job, progress)
    found = [one if isinstance(one, Outcome) else examined(one, source, job, progress) for one in opened]
    return [replace(one, sets=len(found)) for one in found]


def open_cases(source: ModelSource, job: Job, progress: Progress) -> list[Opened | Outcome]:
    """Every set of weights with its clean data; for a set that cannot be scanned, an outcome instead."""
    clock = Clock()

    def opened() -> list[Opened | Outcome]:
        progress("loading")
        loaded = load_models(source, job.options, progress)
        found = [_with_data(model, source, job, progress) for model in loaded.models]
        return found + ([] if job.options.skip_unknown else [_not_checked(one, loaded, job) for one in loaded.unloaded])

    found = survived(opened, source, job, clock)
    return [found] if isinstance(found, Outcome) else found


def examined(opened: Opened, source: ModelSource, job: Job, progress: Progress) -> Outcome:
    """Runs the detectors, until the verdict is sure or the time of the budget ends, and judges."""
    run = partial(_examine, opened, job, progress)
    return survived(run, source, job, opened.clock, opened.case.model)


def survived(
    run: Callable[[], _Done], source: ModelSource, job: Job, clock: Clock, model: Model | None = None
) -> _Done | Outcome:
    """The value of ``run`` for one model; any error becomes the outcome of this model and does not stop the others."""
    try:
        return run()
    except Exception as error:
        if not isinstance(error, BdpruneError):
            log.debug("unexpected error in %s", source, exc_info=True)
        return failure(source, error, job, clock, model)


def detectors_for(opened: Opened, job: Job) -> list[Detector]:
    """The detectors that run on this model; without usable clean data, only data-free ones."""
    return [one for one in job.detectors if opened.case.data is not None or one.needs.images == "none"]


def failure(
    source: ModelSource, error: Exception, job: Job, clock: Clock | None = None, model: Model | None = None
) -> Outcome:
    """The outcome of a model that could not be scanned."""
    clock = clock or Clock()
    unread = None if isinstance(source, Model | torch.nn.Module) else unread_artifact(source)
    return Outcome(
        Result(
            started=clock.started,
            verdict="error",
            risk=None,
            target_label=None,
            artifact=artifact_info(model) if model else unread,
            model=model_info(model) if model else None,
            data=None,
            env=env(parse_device(job.options.device), job.options.seed),
            seconds=clock.seconds,
            error=error_info(error),
        )
    )


def _with_data(model: Model, source: ModelSource, job: Job, progress: Progress) -> Opened | Outcome:
    """The model with its clean data and the check on them; an outcome if they do not fit."""
    clock = Clock()

    def opened() -> Opened:
        fitted, data = job.clean.fit_for(model)
        if data is None:
            return Opened(Case(fitted, keeps=job.keeps), None, None, clock, clock.seconds)
        data = data.by_content  # so that the order of the images does not matter
        progress("checking the clean data")
        sanity = check_sanity(fitted, data, budget=job.budget.started(clock.seconds))
        return Opened(Case(fitted, data if sanity.ok else None, keeps=job.keeps), data, sanity, clock, clock.seconds)

    return survived(opened, source, job, clock, model)


def _not_checked(one: Unloaded, loaded: Loaded, job: Job) -> Outcome:
    """The outcome for a set of weights that could not be loaded, in a file with a loaded model."""
    model = loaded.models[0]
    info = artifact_info(model)
    assert info is not None
    finding = Finding(rule_id=NOT_SCANNED.id, severity="medium", message=f"These weights were not checked: {one.error}")
    return Outcome(
        Result(
            started=Clock().started,
            verdict="inconclusive",
            risk=None,
            target_label=None,
            artifact=msgspec.structs.replace(info, state_key=one.name, prefix=None),
            model=None,
            data=None,
            env=env(model.device, job.options.seed),
            seconds=0.0,
            findings=(finding,),
        )
    )


def start_examination(opened: Opened, job: Job, budget: Budget, models: int = 1) -> Examination:
    """The detectors of this model, which have not run yet.

    Args:
        budget: a budget that has started.
        models: number of models that share its time.
    """
    detectors = detectors_for(opened, job)
    return Examination(opened.case, opened.sanity, detectors, budget, stops=job.stops, models=models, recall=job.recall)


def concluded(opened: Opened, job: Job, exam: Examination) -> Outcome:
    """The outcome of a model whose detectors ran."""
    clock, judgement = Clock(), exam.judgement()
    left_out = tuple(one.id for one in job.detectors if one not in exam.detectors)
    model, data, coverage = opened.case.model, opened.data, weight_coverage(opened.case.model)
    unscanned = coverage is not None and coverage.unscanned and not job.options.skip_unknown
    evidence = tuple(exam.evidence[place] for place in sorted(exam.evidence))
    absent = [] if data is None else data.absent_labels(model.num_classes)
    unseen = unscanned or 2 * len(absent) > model.num_classes
    reasons = (*exam.findings(), *_without_images(absent), *_unchecked(left_out, job), *_not_scanned(coverage))
    risk, calibration = _calibrated(judgement, evidence, model, job, all_labels=not absent)
    judgement = _among_clean(judgement, evidence, calibration, job, all_labels=not absent)
    result = Result(
        started=opened.clock.started,
        verdict="inconclusive" if judgement.verdict == "clean" and unseen else judgement.verdict,
        risk=risk,
        calibration=calibration,
        target_label=judgement.target_label,
        targets=judgement.targets,
        sources=judgement.sources,
        artifact=artifact_info(model),
        model=model_info(model, opened.case.digest),
        detectors=evidence,
        findings=(*judgement.findings, *reasons),
        data=data_info(data, opened.sanity) if data is not None else None,
        env=env(model.device, job.options.seed),
        seconds=opened.seconds + exam.seconds + clock.seconds,
        coverage=coverage,
        not_run=(*exam.not_run, *left_out, *job.beyond, *job.broken),
        budget=str(job.budget),
    )
    wanted = {one.sha256 for seen in evidence for one in seen.attachments}
    return Outcome(result, {digest: opened.case.attachments[digest] for digest in wanted})


def _calibrated(
    judgement: Judgement, evidence: Sequence[Evidence], model: Model, job: Job, all_labels: bool
) -> tuple[float | None, CalibrationInfo | None]:
    """The risk of a model, and how far it is a calibrated probability."""
    if judgement.risk is None or job.calibration is None:
        return judgement.risk, None
    agreement = judgement.verdict == "backdoored"
    found = job.calibration.estimate(evidence, agreement, model.arch, job.budget.level, all_labels)
    return job.calibration.probability(evidence, agreement), found


def _among_clean(
    judgement: Judgement, evidence: Sequence[Evidence], calibration: CalibrationInfo | None, job: Job, all_labels: bool
) -> Judgement:
    """The verdict in view of the clean networks of the table."""
    if calibration is None or job.calibration is None:
        return judgement
    rank = job.calibration.rank(evidence, MOVED_FILTERS, job.budget.level, all_labels)
    return with_p_value(judgement, calibration.p_value, evidence, rank)


def _examine(opened: Opened, job: Job, progress: Progress) -> Outcome:
    exam = start_examination(opened, job, job.budget.started(opened.seconds))
    for place, detector in enumerate(exam.detectors):
        if exam.wants(place):
            progress(stage_of(detector, place, exam))
            exam.run(place)
    return concluded(opened, job, exam)


def stage_of(detector: Detector, place: int, exam: Examination) -> str:
    """The stage in which one model runs the detector at ``place``."""
    return f"running detector {short_id(detector)} ({place + 1} of {len(exam.detectors)})"


def _without_images(absent: Sequence[int]) -> tuple[Finding, ...]:
    """A finding for the labels without clean images."""
    if not absent:
        return ()
    message = (
        f"These labels have no clean image: {some([str(label) for label in absent])}. A backdoor that works on such "
        "images only is not seen, and scores may differ from those of scans with all labels."
    )
    return (Finding(rule_id=NOT_JUDGED.id, severity="medium", message=message),)


def _unchecked(left_out: Sequence[str], job: Job) -> tuple[Finding, ...]:
    """Findings for the detectors that lack data, that the budget leaves out, and that cannot be made."""
    reasons = {"there is no usable clean data": left_out, f"the budget {job.budget} leaves them out": job.beyond}
    infos = [f"Not run, because {why}: {', '.join(ids)}." for why, ids in reasons.items() if ids]
    broken = [f"Not run, because it cannot be made: {name}. {reason}" for name, reason in job.broken.items()]
    return (
        *(Finding(rule_id=NOT_JUDGED.id, severity="info", message=one) for one in infos),
        *(Finding(rule_id=NOT_JUDGED.id, severity="medium", message=one) for one in broken),
    )


def _not_scanned(coverage: WeightCoverage | None) -> tuple[Finding, ...]:
    """A finding for the weights of the file that were not scanned."""
    if coverage is None or not (coverage.unscanned or coverage.left_out):
        return ()
    parts = [f"weights outside the recognised networks: {some(coverage.unscanned)}"] if coverage.unscanned else []
    parts += [f"other sets of weights: {some(coverage.left_out)}"] if coverage.left_out else []
    severity: Severity = "medium" if coverage.unscanned else "info"
    return (Finding(rule_id=NOT_SCANNED.id, severity=severity, message=f"Not scanned: {'; '.join(parts)}."),)


_HERE = threading.RLock()
"""Held while this process scans a model: tracing a network and seeding change what all threads share."""


_Item = TypeVar("_Item")


class CallersRandom:
    """Keeps the random numbers of scans in this process apart from those of the caller and its iterator of models."""

    def __init__(self) -> None:
        self._callers = _random_state()

    def outcomes(self, outcomes: Iterator[_Item]) -> Iterator[_Item]:
        """The same outcomes; other threads wait while one is computed."""
        while True:
            with _HERE, plain_torch():
                self._callers = _random_state()
                try:
                    outcome = next(outcomes, None)
                finally:
                    _set_random_state(self._callers)
            if outcome is None:
                return
            yield outcome

    def models(self, models: Iterator[_Item]) -> Iterator[_Item]:
        """The same models, made with the caller's random numbers."""
        while True:
            of_scans = _random_state()
            _set_random_state(self._callers)
            try:
                model = next(models)
            except StopIteration:
                return
            finally:
                self._callers = _random_state()
                _set_random_state(of_scans)
            with plain_torch():  # the caller's iterator may have set another state
                yield model


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
