"""Scans one model: opens it, checks it on the clean data, runs the detectors, and judges."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import torch

from bdprune.analysis import Case, Sanity, check_sanity
from bdprune.data import CleanData
from bdprune.errors import BdpruneError, first_line
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
from bdprune.pipeline.open import CleanSource, ModelSource, Options, load_models, parse_device
from bdprune.record import Evidence, Finding, Result, Severity, WeightCoverage, nothing_seen, some
from bdprune.verdict import NOT_JUDGED, NOT_SCANNED, judge

Progress = Callable[[str], None]
"""Called with the next stage of the current model, such as ``loading`` or ``running detector unlearning (2 of 3)``."""

log = logging.getLogger(__name__)

_Done = TypeVar("_Done")


@dataclass
class Job:
    """The settings that all models of a run share; it can be sent to another process."""

    clean: CleanSource
    detectors: Sequence[Detector]
    options: Options
    broken: Mapping[str, str] = field(default_factory=dict)
    keeps: bool = False
    threads: int = field(default_factory=torch.get_num_threads)


@dataclass(frozen=True)
class Outcome:
    """The result of one model, and the bytes of its attachments by their SHA-256."""

    result: Result
    attachments: Mapping[str, bytes] = field(default_factory=dict)


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
    return [one if isinstance(one, Outcome) else examined(one, source, job, progress) for one in opened]


def open_cases(source: ModelSource, job: Job, progress: Progress) -> list[Opened | Outcome]:
    """Every set of weights with its clean data; for a set that cannot be scanned, an outcome instead."""
    clock = Clock()

    def opened() -> list[Opened | Outcome]:
        progress("loading")
        loaded = load_models(source, job.options)
        found = [_with_data(model, source, job, progress) for model in loaded.models]
        return found + ([] if job.options.skip_unknown else [_not_checked(one, loaded, job) for one in loaded.unloaded])

    found = survived(opened, source, job, clock)
    return [found] if isinstance(found, Outcome) else found


def examined(
    opened: Opened, source: ModelSource, job: Job, progress: Progress, known: Mapping[int, Evidence] | None = None
) -> Outcome:
    """Runs the detectors and judges.

    Args:
        known: existing evidence, by the detector's place in :func:`detectors_for`.
    """
    run = partial(_examine, opened, job, progress, known or {})
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
    unread = None if isinstance(source, Model | torch.nn.Module) else unread_artifact(Path(source))
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
        sanity = check_sanity(fitted, data)
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


def _examine(opened: Opened, job: Job, progress: Progress, known: Mapping[int, Evidence]) -> Outcome:
    clock, running = Clock(), detectors_for(opened, job)
    left_out = tuple(one.id for one in job.detectors if one not in running)
    evidence = []
    for place, detector in enumerate(running):
        if place not in known:
            progress(f"running detector {short_id(detector)} ({place + 1} of {len(running)})")
        evidence.append(known[place] if place in known else _run(detector, opened.case))
    judgement = judge(running, evidence, opened.sanity)
    model, data, coverage = opened.case.model, opened.data, weight_coverage(opened.case.model)
    unscanned = coverage is not None and coverage.unscanned and not job.options.skip_unknown
    result = Result(
        started=opened.clock.started,
        verdict="inconclusive" if judgement.verdict == "clean" and unscanned else judgement.verdict,
        risk=judgement.risk,
        target_label=judgement.target_label,
        artifact=artifact_info(model),
        model=model_info(model, opened.case.digest),
        detectors=tuple(evidence),
        findings=(*judgement.findings, *_unchecked(left_out, job.broken), *_not_scanned(coverage)),
        data=data_info(data, opened.sanity) if data is not None else None,
        env=env(model.device, job.options.seed),
        seconds=opened.seconds + sum(one.seconds or 0.0 for one in known.values()) + clock.seconds,
        coverage=coverage,
        not_run=(*left_out, *job.broken),
    )
    wanted = {one.sha256 for seen in evidence for one in seen.attachments}
    return Outcome(result, {digest: opened.case.attachments[digest] for digest in wanted})


def _run(detector: Detector, case: Case) -> Evidence:
    """The detector's evidence; a detector that fails gives evidence without a score."""
    clock = Clock()
    try:
        with Isolated([case], detector) as cases:
            evidence = checked_evidence(detector(cases[0]), detector, case)
        return msgspec.structs.replace(evidence, seconds=clock.seconds)
    except BdpruneError as error:
        return nothing_seen(detector.id, str(error), clock.seconds)
    except Exception as error:
        log.debug("unexpected error in %s", detector.id, exc_info=True)
        what = f"Unexpected {type(error).__name__}: {first_line(error)}."
        return nothing_seen(detector.id, f"{what} Please report it to the authors of {detector.id}.", clock.seconds)


def checked_evidence(evidence: object, detector: Detector, case: Case) -> Evidence:
    """The evidence after conversion to plain JSON values.

    Raises:
        ValueError, TypeError: the evidence is invalid.
    """
    if not isinstance(evidence, Evidence):
        raise TypeError(f"it returned {type(evidence).__name__}, not Evidence")
    tidy = evidence.tidy()
    if tidy.detector != detector.id:
        raise ValueError(f"its evidence names another detector, {tidy.detector[:80]!r}")
    if tidy.target_label is not None and not 0 <= tidy.target_label < case.model.num_classes:
        raise ValueError(f"it names label {tidy.target_label} of {case.model.num_classes} classes")
    if not all(one.sha256 in case.attachments for one in tidy.attachments):
        raise ValueError("it names an attachment that was not made with case.attach")
    return tidy


class Isolated:
    """The cases that a detector receives. A plug-in gets copies, so that it cannot affect other detectors.

    Raises:
        ValueError: at the end, if the plug-in changed the model or the images; analyses of them are then discarded.
    """

    def __init__(self, cases: Sequence[Case], detector: Detector) -> None:
        built_in = type(detector).__module__.startswith("bdprune.")
        self._cases, self._copies = cases, list(cases) if built_in else [_copied(case) for case in cases]

    def __enter__(self) -> list[Case]:
        return self._copies

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        changed = False
        for case, copy in zip(self._cases, self._copies, strict=True):
            if copy is not case and _copied(copy).key_of_all != case.key_of_all:
                case.memo.forget(case.digest)
                changed = True
        if changed:
            raise ValueError("it changed the model or the images that it was given")


def _copied(case: Case) -> Case:
    data = case.data
    if data is not None:
        data = replace(data, images=data.images.clone(), labels=data.labels.clone())
    return Case(case.model.clone(), data, case.memo, case.attachments, case.keeps)


def _unchecked(left_out: Sequence[str], broken: Mapping[str, str]) -> tuple[Finding, ...]:
    """A finding for the detectors that lack data, and one for each plug-in that cannot be made."""
    message = f"Not run, because there is no usable clean data: {', '.join(left_out)}."
    first = [Finding(rule_id=NOT_JUDGED.id, severity="info", message=message)] if left_out else []
    others = (f"Not run, because it cannot be made: {name}. {reason}" for name, reason in broken.items())
    return (*first, *(Finding(rule_id=NOT_JUDGED.id, severity="medium", message=one) for one in others))


def _not_scanned(coverage: WeightCoverage | None) -> tuple[Finding, ...]:
    """A finding for the weights of the file that were not scanned."""
    if coverage is None or not (coverage.unscanned or coverage.left_out):
        return ()
    parts = [f"weights outside the recognised networks: {some(coverage.unscanned)}"] if coverage.unscanned else []
    parts += [f"other sets of weights: {some(coverage.left_out)}"] if coverage.left_out else []
    severity: Severity = "medium" if coverage.unscanned else "info"
    return (Finding(rule_id=NOT_SCANNED.id, severity=severity, message=f"Not scanned: {'; '.join(parts)}."),)
