"""Scanning many models in order, those of one architecture in the same steps.

Models are read ahead until a stack of one architecture is full. What is said of each is what a scan of it alone says:
a detector that has no ``together``, or whose ``together`` breaks down, is called for every model by itself.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from bdprune.errors import OptionError
from bdprune.methods import Evidence, StackDetector
from bdprune.model import StackedNetwork, agrees, why_not
from bdprune.pipeline import (
    Candidate,
    Job,
    ModelSource,
    Progress,
    detectors_for,
    examine,
    free_memory,
    nothing_seen,
    parse_device,
    survive,
    take_in,
)
from bdprune.record import Result
from bdprune.runtime import choose, footprint, weight_bytes

_MOST = 64  # models in a stack whose size nobody has said: a GPU is full before that
_PATIENCE = 4  # stacks' worth of models that may be read ahead of the oldest one that waits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StackOptions:
    """How stacks are filled.

    Args:
        size: models of one architecture in a stack at most; 1 scans one after another. ``auto`` fills stacks where a
            trial finds them faster, of up to 64 models; on a CPU two models are tried on a few images before any is
            read ahead, and where the loop wins, nothing waits for anything.
        memory: bytes, half of them for the stack that runs and half for the models that wait for theirs; a stack is
            smaller where it would take more. None takes half of what is free on the device as the scan begins.

    Raises:
        OptionError: a size or a memory that cannot be.
    """

    size: int | str = "auto"
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.size != "auto" and (not isinstance(self.size, int) or self.size < 1):
            raise OptionError(f"A stack of {str(self.size)[:80]} models cannot be filled.", "Give auto, or 1 or more.")
        if self.memory is not None and self.memory < 1:
            raise OptionError(f"Stacks cannot run in {self.memory} bytes.", "Give some, as in --stack-memory 2GiB.")

    @property
    def most(self) -> int:
        """Models in a stack at most."""
        return self.size if isinstance(self.size, int) else _MOST


@dataclass(eq=False)
class _Place:
    """A model in the line: its result where it is done, else the candidate that waits, and the bytes of its weights."""

    source: ModelSource
    result: Result | None = None
    candidate: Candidate | None = None
    weights: int = 0


@dataclass(eq=False)
class _Stack:
    """Candidates of one kind: as many as are here already, and as many as fit."""

    size: int
    places: list[_Place] = field(default_factory=list)


class StackedScan:
    """Scans the models of one run.

    Args:
        job: what is the same for every model.
        options: how stacks are filled.
        progress: told what happens.
    """

    def __init__(self, job: Job, options: StackOptions, progress: Progress) -> None:
        self._job, self._options, self._progress = job, options, progress
        self._line: deque[_Place] = deque()
        self._stacks: dict[Hashable, _Stack] = {}
        self._room: int | None = None

    def results(self, sources: Iterable[ModelSource]) -> Iterator[Result]:
        """One result a model, in order; those that stand behind one that waits come when its stack has run."""
        for source in sources:
            self._take(source)
            while self._is_crowded():
                self._run(self._oldest())
                yield from self._finished()
            yield from self._finished()
        yield from self._rest()

    def _rest(self) -> Iterator[Result]:
        for stack in self._stacks.values():
            self._run(stack)
        yield from self._finished()

    def _finished(self) -> Iterator[Result]:
        while self._line and self._line[0].result is not None:
            yield self._line.popleft().result  # type: ignore[misc]

    def _take(self, source: ModelSource) -> None:
        """Puts every set of weights of ``source`` into the line."""
        found = survive(partial(take_in, source, self._job, self._progress), source, self._job)
        for one in [found] if isinstance(found, Result) else found:
            if isinstance(one, Result):
                self._line.append(_Place(source, one))
            else:
                self._line.append(_Place(source, None, one, weight_bytes(one.model)))
                self._into_stack(self._line[-1], one)

    def _into_stack(self, place: _Place, candidate: Candidate) -> None:
        kind = _kind(candidate)
        if kind not in self._stacks:
            size = survive(partial(self._size, candidate), place.source, self._job)
            self._stacks[kind] = _Stack(size if isinstance(size, int) else 1)
        stack = self._stacks[kind]
        stack.places.append(place)
        if len(stack.places) >= stack.size:
            self._run(stack)

    def _is_crowded(self) -> bool:
        """Whether models that wait take too much memory, or others wait too long behind them."""
        waiting = [place for place in self._line if place.candidate is not None]
        weights = sum(place.weights for place in waiting)
        crowded = len(self._line) > _PATIENCE * self._options.most or weights > self._half()
        return bool(waiting) and crowded

    def _oldest(self) -> _Stack:
        oldest = next(place for place in self._line if place.candidate is not None)
        return next(stack for stack in self._stacks.values() if oldest in stack.places)

    def _half(self) -> int:
        if self._room is None:
            device = parse_device(self._job.options.device)
            self._room = self._options.memory or free_memory(device) // 2
        return self._room // 2

    def _size(self, candidate: Candidate) -> int:
        """How many models like this one go into a stack; 1 where they are scanned one after another.

        Any exception comes of a network that does not run as a stack: then it is 1 as well.
        """
        detectors = [one for one in detectors_for(candidate, self._job) if isinstance(one, StackDetector)]
        if self._options.size == 1 or not detectors or why_not([candidate.model]):
            return 1
        batch = max(_batch(detector, candidate) for detector in detectors)
        if self._options.size == "auto" and candidate.model.device.type == "cpu":
            if not batch or candidate.usable is None:
                return 1
            if choose([candidate.model] * 2, candidate.usable.images[:batch]).path == "loop":
                return 1
        fit = self._half() // footprint(candidate.model, batch)
        return max(1, min(self._options.most, fit))

    def _run(self, stack: _Stack) -> None:
        places, stack.places = stack.places, []
        candidates = [place.candidate for place in places if place.candidate is not None]
        known: dict[int, list[Evidence]] = {}
        if len(candidates) > 1:
            for number, detector in enumerate(detectors_for(candidates[0], self._job)):
                seen = self._together(detector, candidates) if isinstance(detector, StackDetector) else None
                if seen is not None:
                    known[number] = seen
        for index, (place, candidate) in enumerate(zip(places, candidates, strict=True)):
            own = {number: seen[index] for number, seen in known.items()}
            run = partial(examine, candidate, self._job, self._progress, own)
            place.result, place.candidate = survive(run, place.source, self._job, candidate.model), None

    def _together(self, detector: StackDetector, candidates: Sequence[Candidate]) -> list[Evidence] | None:
        """What the detector saw in each model, None where it is to look at them one by one."""
        models, data = [one.model for one in candidates], candidates[0].usable
        self._progress(f"{detector.id} on {len(models)} models")
        try:
            if not self._is_sound(detector, candidates):
                return None
            found = list(detector.together(models, data))
        except Exception:  # whatever it is, the models that it does not concern get their evidence one by one
            log.debug("%s broke down on a stack of %d", detector.id, len(models), exc_info=True)
            return None
        if len(found) != len(models):
            log.warning("%s saw %d models in a stack of %d and is asked again", detector.id, len(found), len(models))
            return None
        heard = [one if isinstance(one, Evidence) else nothing_seen(detector, one, 0.0) for one in found]
        return [replace(one, details={**one.details, "stack": len(models)}) for one in heard]

    def _is_sound(self, detector: StackDetector, candidates: Sequence[Candidate]) -> bool:
        """Whether these models can be one network, and whether that is what was asked for or what is faster."""
        models, batch = [one.model for one in candidates], _batch(detector, candidates[0])
        data = candidates[0].usable
        if not batch or data is None:
            return True
        if self._options.size == "auto":
            return choose(models, data.images[:batch]).path == "stack"
        return not why_not(models) and agrees(StackedNetwork(models))


def _batch(detector: StackDetector, candidate: Candidate) -> int:
    """Images in a step on this candidate's clean data."""
    return min(detector.batch_size, len(candidate.usable)) if candidate.usable is not None else 0


def _kind(candidate: Candidate) -> Hashable:
    """What the models of a stack have in common; whether their layers agree is looked at before it runs."""
    model = candidate.model
    shapes = tuple((name, value.shape) for name, value in model.network.state_dict().items())
    return type(model.network), model.arch, model.num_classes, model.input_shape, candidate.usable is None, shapes
