"""Scans many models in order, and models of one architecture in one batch.

It reads models ahead until a stack of one architecture is full. Each model gets the same result as in a scan of its
own. A detector without ``steps``, or whose analyses fail on a stack, runs on each model separately.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec

from bdprune.analysis import Case
from bdprune.errors import BdpruneError, BudgetError, OptionError
from bdprune.fleet.executors.inline import Models, Numbered, Pause
from bdprune.methods import Detector, examine_stack
from bdprune.model import StackedNetwork, agrees, why_not
from bdprune.pipeline import (
    Clock,
    Examination,
    Isolated,
    Job,
    ModelSource,
    Opened,
    Outcome,
    Progress,
    checked_evidence,
    concluded,
    detectors_for,
    examined,
    free_memory,
    open_cases,
    parse_device,
    short_id,
    stage_of,
    start_examination,
    survived,
)
from bdprune.record import Evidence, nothing_seen
from bdprune.runtime import footprint, stack_or_loop, weight_bytes

_MOST = 64  # models in a stack of unspecified size; a GPU is full with fewer
_READ_AHEAD = 4  # stacks of models that may be read while the oldest model waits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StackOptions:
    """Size and memory limit of stacks.

    Args:
        size: maximum number of models of one architecture in a stack; 1 scans one model after another. ``auto`` uses
            stacks of up to 64 models if a trial finds them faster. On a CPU, the trial runs two models on a few
            images before models are read ahead; if the loop is faster, no model has to wait.
        memory: bytes, half for the running stack and half for models that wait. Stacks are smaller if they would
            need more. None means half of the device's free memory at the start of the scan.

    Raises:
        OptionError: the size or the memory is less than 1.
    """

    size: int | str = "auto"
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.size != "auto" and (not isinstance(self.size, int) or self.size < 1):
            raise OptionError(f"A stack needs at least 1 model, not {str(self.size)[:80]}.", "Give auto, or 1 or more.")
        if self.memory is not None and self.memory < 1:
            hint = "Give more, as in --stack-memory 2GiB."
            raise OptionError(f"Stacks need at least 1 byte of memory, not {self.memory}.", hint)

    @property
    def most(self) -> int:
        """Maximum number of models in a stack."""
        return self.size if isinstance(self.size, int) else _MOST


@dataclass(eq=False)
class _Place:
    """A model in the queue: its outcome if it is done, else its opened case, and the bytes of its weights.

    ``sets`` is the number of sets of weights in its file.
    """

    number: int
    source: ModelSource
    sets: int
    outcome: Outcome | None = None
    opened: Opened | None = None
    weights: int = 0


@dataclass(eq=False)
class _Stack:
    """Cases of one kind that wait for a full stack, and the size of the stack."""

    size: int
    places: list[_Place] = field(default_factory=list)


@dataclass(frozen=True)
class StackExecutor:
    """Scans models of one architecture in one batch.

    Args:
        options: size and memory limit of the stacks.
    """

    options: StackOptions = field(default_factory=StackOptions)

    def ahead(self, job: Job) -> int:
        """The size of a stack; for ``auto`` on a CPU it is 1, because there the loop nearly always is faster."""
        on_cpu = parse_device(job.options.device).type == "cpu"
        return 1 if self.options.size == "auto" and on_cpu else self.options.most

    def run(self, models: Models, job: Job, progress: Progress) -> Iterator[Numbered | None]:
        """The outcomes of all models in order; a model that waits for its stack delays the models behind it."""
        return _Line(job, self.options, progress).outcomes(models)


class _Line:
    """The queue of models of one run, in order, and the stacks in which they wait."""

    def __init__(self, job: Job, options: StackOptions, progress: Progress) -> None:
        self._job, self._options, self._progress = job, options, progress
        self._line: deque[_Place] = deque()
        self._stacks: dict[Hashable, _Stack] = {}
        self._memory: int | None = None

    def outcomes(self, models: Models) -> Iterator[Numbered | None]:
        """One outcome for each set of weights."""
        number = 0
        for source in models:
            if isinstance(source, Pause):
                yield from self._finished()
                if source is Pause.FULL and self._line:
                    self._run(self._oldest())
                    yield from self._finished()
                yield None
                continue
            self._take(number, source)
            number += 1
            while self._is_full():
                self._run(self._oldest())
                yield from self._finished()
            yield from self._finished()
        for stack in self._stacks.values():
            self._run(stack)
        yield from self._finished()

    def _finished(self) -> Iterator[Numbered]:
        while self._line and self._line[0].outcome is not None:
            place = self._line.popleft()
            assert place.outcome is not None
            yield place.number, replace(place.outcome, sets=place.sets)

    def _take(self, number: int, source: ModelSource) -> None:
        """Adds every set of weights of ``source`` to the queue."""
        found = open_cases(source, self._job, self._progress)
        for one in found:
            if isinstance(one, Outcome):
                self._line.append(_Place(number, source, len(found), one))
            else:
                self._line.append(_Place(number, source, len(found), None, one, weight_bytes(one.case.model)))
                self._into_stack(self._line[-1], one)

    def _into_stack(self, place: _Place, opened: Opened) -> None:
        kind = _kind(opened)
        if kind not in self._stacks:
            size = survived(partial(self._size, opened), place.source, self._job, Clock())
            self._stacks[kind] = _Stack(size if isinstance(size, int) else 1)
        stack = self._stacks[kind]
        stack.places.append(place)
        if len(stack.places) >= stack.size:
            self._run(stack)

    def _is_full(self) -> bool:
        """Whether waiting models take too much memory, or too many models queue behind them."""
        waiting = [place for place in self._line if place.opened is not None]
        weights = sum(place.weights for place in waiting)
        full = len(self._line) > _READ_AHEAD * self._options.most or weights > self._half()
        return bool(waiting) and full

    def _oldest(self) -> _Stack:
        oldest = next(place for place in self._line if place.opened is not None)
        return next(stack for stack in self._stacks.values() if oldest in stack.places)

    def _half(self) -> int:
        if self._memory is None:
            device = parse_device(self._job.options.device)
            self._memory = self._options.memory or free_memory(device) // 2
        return self._memory // 2

    def _size(self, opened: Opened) -> int:
        """How many models like this one go into a stack; 1 scans them one after another.

        An exception means that the network does not run in a stack; the caller then takes 1.
        """
        case = opened.case
        detectors = [one for one in detectors_for(opened, self._job) if one.takes_stacks()]
        if self._options.size == 1 or not detectors or why_not([case.model]):
            return 1
        batch = max(_batch(detector, case) for detector in detectors)
        if self._options.size == "auto" and case.model.device.type == "cpu":
            if not batch or case.data is None:
                return 1
            if stack_or_loop([case.model] * 2, case.data.images[:batch]).winner == "loop":
                return 1
        fit = self._half() // footprint(case.model, batch)
        return max(1, min(self._options.most, fit))

    def _run(self, stack: _Stack) -> None:
        """Runs the detectors on all models of a stack; a model whose verdict is sure leaves it."""
        places, stack.places = stack.places, []
        opened = [place.opened for place in places if place.opened is not None]
        if not opened:
            return
        if len(opened) == 1:
            places[0].outcome = examined(opened[0], places[0].source, self._job, self._progress)
        else:
            exams = self._examinations(opened)
            for place, one, exam in zip(places, opened, exams, strict=True):
                conclude = partial(concluded, one, self._job, exam)
                place.outcome = survived(conclude, place.source, self._job, one.clock, one.case.model)
        for place in places:
            place.opened = None

    def _examinations(self, opened: Sequence[Opened]) -> list[Examination]:
        """The examination of each model after all detectors."""
        budget = self._job.budget.started(sum(one.seconds for one in opened), len(opened))
        exams = [start_examination(one, self._job, budget, len(opened)) for one in opened]
        for place, detector in enumerate(exams[0].detectors):
            wanting = [exam for exam in exams if exam.wants(place)]
            if len(wanting) > 1 and detector.takes_stacks() and self._in_one_batch(place, detector, wanting):
                continue
            for exam in wanting:
                self._progress(stage_of(detector, place, exam))
                exam.run(place)
        return exams

    def _in_one_batch(self, place: int, detector: Detector, exams: Sequence[Examination]) -> bool:
        """Runs the detector on all models in one batch; returns False if it has to run on each of them separately."""
        self._progress(f"running detector {short_id(detector)} on {len(exams)} models")
        start, cases = time.perf_counter(), [exam.case_for(place) for exam in exams]
        try:
            if not self._is_sound(detector, cases):
                return False
            with Isolated(cases, detector) as own:
                found = examine_stack(detector, own)
            seen = [_checked(one, detector, case) for one, case in zip(found, cases, strict=True)]
        except Exception:  # each model then gets its evidence separately, so that one bad model harms no other
            log.debug("%s failed on a stack of %d", detector.id, len(exams), exc_info=True)
            return False
        share = (time.perf_counter() - start) / len(exams)
        for exam, one in zip(exams, seen, strict=True):
            if isinstance(one, Evidence):
                one = msgspec.structs.replace(one, details={**one.details, "stack": len(exams)})
            exam.take(place, one, share)
        return True

    def _is_sound(self, detector: Detector, cases: Sequence[Case]) -> bool:
        """Whether these models can run as one network and, for ``auto``, whether that is faster."""
        models, batch = [case.model for case in cases], _batch(detector, cases[0])
        data = cases[0].data
        if not batch or data is None:
            return True
        if self._options.size == "auto":
            return stack_or_loop(models, data.images[:batch]).winner == "stack"
        return not why_not(models) and agrees(StackedNetwork(models))


def _batch(detector: Detector, case: Case) -> int:
    """Number of images in a step on the clean data of this case."""
    return min(detector.batch_size, len(case.data)) if case.data is not None else 0


def _checked(found: Evidence | BdpruneError, detector: Detector, case: Case) -> Evidence | BudgetError:
    if isinstance(found, BudgetError):
        return found
    if isinstance(found, BdpruneError):
        return nothing_seen(detector.id, str(found))
    return checked_evidence(found, detector, case)


def _kind(opened: Opened) -> Hashable:
    """The key of models that can share a stack; :meth:`_Line._is_sound` compares their layers before the stack runs."""
    model = opened.case.model
    shapes = tuple((name, value.shape) for name, value in model.network.state_dict().items())
    return type(model.network), model.arch, model.num_classes, model.input_shape, opened.case.data is None, shapes
