"""Runs the detectors of a scan on one model, one after another, until it is sure or the time of its budget ends."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import msgspec
import torch
from torch import Tensor

from bdprune.analysis import Case, Sanity
from bdprune.errors import BdpruneError, BudgetError, first_line
from bdprune.methods import Detector
from bdprune.model import Model
from bdprune.record import SIGNS, Evidence, Finding, nothing_seen
from bdprune.runtime import Budget, predict
from bdprune.verdict import NOT_JUDGED, Judgement, judge

log = logging.getLogger(__name__)

Recall = Callable[[Case, Detector], tuple[Evidence, Mapping[str, bytes]] | None]
"""Gives the evidence of an earlier run of a detector on an equal case, with the bytes of its attachments by their
SHA-256; None if there is none."""

_TRIAL = 0.05
"""Seconds of a trial that are enough to estimate the time of one image."""

_TRIAL_IMAGES, _TRIALS = 32, 3


class Examination:
    """The detectors of one model in their order, their evidence so far, and the reasons why some do not run.

    Args:
        case: the model, with its clean images if they can be used.
        sanity: the check on the clean images; None without any.
        detectors: the detectors that can run on this case, in order.
        budget: a budget that has started.
        stops: whether the remaining detectors do not run once the verdict is sure.
        models: number of models that share the time and run in the same steps.
        recall: gives known evidence, so that its detector does not run; None gives none.
    """

    def __init__(
        self,
        case: Case,
        sanity: Sanity | None,
        detectors: Sequence[Detector],
        budget: Budget,
        *,
        stops: bool = False,
        models: int = 1,
        recall: Recall | None = None,
    ) -> None:
        self.case, self.detectors, self.evidence = case, detectors, dict[int, Evidence]()
        self.seconds = 0.0
        self._sanity, self._budget, self._stops, self._models = sanity, budget, stops, models
        self._recall = recall
        self._late: dict[int, str] = {}
        self._pace: float | None = None
        self._sure = False

    def wants(self, place: int) -> bool:
        """Whether the detector at ``place`` still has to run; if not, its known evidence or the reason is kept."""
        if self._stops and self._sure:
            return False
        if self._recall is not None and (known := self._recall(self.case, self.detectors[place])) is not None:
            evidence, contents = known
            self.case.attachments.update(contents)
            self._keep(place, evidence)
            return False
        needed, left = self._estimate(place), self._budget.remaining
        if left <= 0:
            self._late[place] = ""
        elif needed > left:
            self._late[place] = f"needs about {needed:,.0f} s"
        return place not in self._late

    def case_for(self, place: int) -> Case:
        """The case for the detector at ``place``, whose deadline leaves time for later detectors that would fit."""
        left = self._budget.remaining - self._estimate(place)
        reserved = 0.0
        if math.isfinite(left):
            for later in range(place + 1, len(self.detectors)):
                needed = self._estimate(later)
                reserved += needed if reserved + needed <= left else 0.0
        return self.case.with_budget(self._budget.less(reserved))

    def run(self, place: int) -> None:
        """Runs the detector at ``place`` on this model alone."""
        start = time.perf_counter()
        found = _run(self.detectors[place], self.case_for(place))
        self.take(place, found, time.perf_counter() - start)

    def take(self, place: int, found: Evidence | BudgetError, seconds: float) -> None:
        """Keeps the evidence of the detector at ``place``, or that its time did not suffice."""
        self.seconds += seconds
        if isinstance(found, BudgetError):
            self._late[place] = found.message[0].lower() + found.message[1:].rstrip(".")
            return
        self._keep(place, msgspec.structs.replace(found, seconds=seconds))

    def _keep(self, place: int, evidence: Evidence) -> None:
        self.evidence[place] = evidence
        self._sure = self.judgement().verdict == "backdoored"

    def judgement(self) -> Judgement:
        """The verdict on the evidence so far."""
        ran = sorted(self.evidence)
        return judge([self.detectors[place] for place in ran], [self.evidence[place] for place in ran], self._sanity)

    @property
    def not_run(self) -> tuple[str, ...]:
        """Ids of the detectors that did not run."""
        return tuple(one.id for place, one in enumerate(self.detectors) if place not in self.evidence)

    def findings(self) -> tuple[Finding, ...]:
        """Why detectors did not run, and what was therefore not looked at."""
        spared = [one.id for place, one in enumerate(self.detectors) if place not in self.evidence | self._late]
        late = [self.detectors[place].id + (f" ({why})" if why else "") for place, why in sorted(self._late.items())]
        found = []
        if spared:
            message = f"Not run, because two kinds of evidence already agree: {', '.join(spared)}."
            found.append(Finding(rule_id=NOT_JUDGED.id, severity="info", message=message))
        if late:
            message = f"Not run, because the budget of {self._budget} does not suffice: {', '.join(late)}."
            message = " ".join([message, *self._unseen()])
            found.append(Finding(rule_id=NOT_JUDGED.id, severity="medium", message=message))
        return tuple(found)

    def _unseen(self) -> list[str]:
        """What no detector looked at for lack of time, in a sentence; empty if others looked at everything."""
        seen = {self.detectors[place].sign for place in self.evidence}
        missed = dict.fromkeys(
            SIGNS[one.sign] for place in self._late if (one := self.detectors[place]).sign not in seen
        )
        return [f"So it was not checked whether there is {' or '.join(missed)}."] if missed else []

    def _estimate(self, place: int) -> float:
        """Seconds that the detector at ``place`` needs at least; 0 without a time limit."""
        if self._budget.seconds is None:
            return 0.0
        if self._pace is None:
            self._pace = seconds_per_image(self.case.model)
        return self.detectors[place].work(self.case) * self._pace * self._models


def seconds_per_image(model: Model) -> float:
    """Time of one image on its way through ``model``, from short trials; 0 if the model fails on them."""
    count, took = 1, 0.0
    try:
        predict(model.module, torch.zeros(1, *model.input_shape))  # the first pass is slower
        while took < _TRIAL and count <= _TRIAL_IMAGES:
            images = torch.zeros(count, *model.input_shape)
            took = min(_timed(model, images) for _ in range(_TRIALS))  # other work disturbs some of them
            count *= 4
    except Exception:  # the detectors report what is wrong with the model
        return 0.0
    return took / len(images)


def _timed(model: Model, images: Tensor) -> float:
    """Seconds that the predictions for the images take."""
    start = time.perf_counter()
    predict(model.module, images)
    return time.perf_counter() - start


def _run(detector: Detector, case: Case) -> Evidence | BudgetError:
    """The detector's evidence; a detector that fails gives evidence without a score."""
    try:
        with Isolated([case], detector) as cases:
            return checked_evidence(detector(cases[0]), detector, case)
    except BudgetError as error:
        return error
    except BdpruneError as error:
        return nothing_seen(detector.id, str(error))
    except Exception as error:
        log.debug("unexpected error in %s", detector.id, exc_info=True)
        what = f"Unexpected {type(error).__name__}: {first_line(error)}."
        return nothing_seen(detector.id, f"{what} Please report it to the authors of {detector.id}.")


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
    for label in (*tidy.labels, *tidy.targets, *tidy.sources):
        if not 0 <= label < case.model.num_classes:
            raise ValueError(f"it names label {label} of {case.model.num_classes} classes")
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
    return Case(case.model.clone(), data, case.memo, case.attachments, case.keeps, case.budget)
