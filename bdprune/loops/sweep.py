"""The threshold sweep: how far can filters be pruned before clean accuracy on held-out clean data gives way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import TypeAlias

from torch import Tensor

from bdprune.data import CleanData
from bdprune.loops.pruned import CACHE_BYTES, Predict, PrunedPredictions
from bdprune.loops.pruned_stack import in_one_stack
from bdprune.loops.sweep_path import sweep_path
from bdprune.model import Model, PruneMode
from bdprune.runtime import DEFAULT, Precision, Way, convs_of, share_right, weight_bytes

Masks: TypeAlias = Mapping[str, Tensor]
Steps: TypeAlias = list[dict[str, list[int]]]
"""The prunings of a model, none at all first."""


@dataclass(frozen=True)
class SweepPoint:
    """One threshold, and the filters that it prunes.

    Attributes:
        threshold: masks at or below it are pruned.
        clean_accuracy: what is left on the first set of clean images, in [0, 1].
        drop: largest fall of clean accuracy among all the sets, in [-1, 1].
        pruned: group name -> indices of its pruned filters.
    """

    threshold: float
    clean_accuracy: float
    drop: float
    pruned: dict[str, list[int]]

    @property
    def filters_pruned(self) -> int:
        """Number of pruned filters."""
        return sum(map(len, self.pruned.values()))


@dataclass(frozen=True)
class Sweep:
    """Clean accuracy without pruning on the first set, and the points in order of threshold."""

    accuracy_before: float
    points: tuple[SweepPoint, ...]

    def highest(self, max_drop: float) -> SweepPoint | None:
        """The point of the highest threshold that costs at most ``max_drop``, None when there is none."""
        fits = [point for point in self.points if point.drop <= max_drop]
        return fits[-1] if fits else None


def below(scores: Masks, threshold: float) -> dict[str, list[int]]:
    """Filters whose score is at or below ``threshold``; groups without one are left out."""
    hits = {name: (score <= threshold).nonzero().flatten().tolist() for name, score in scores.items()}
    return {name: index for name, index in hits.items() if index}


@dataclass(frozen=True)
class _Course:
    """What is the same for every model of a sweep; see :func:`sweep_thresholds`."""

    sets: Sequence[CleanData]
    thresholds: Sequence[float]
    max_drop: float
    mode: PruneMode
    stop_early: bool
    hopeless: float

    @property
    def images(self) -> list[Tensor]:
        return [data.images for data in self.sets]


def sweep_thresholds(
    model: Model,
    masks: Masks,
    sets: Sequence[CleanData],
    thresholds: Sequence[float],
    max_drop: float,
    mode: PruneMode,
    stop_early: bool = True,
    hopeless: float = 1.0,
    cache_bytes: int = CACHE_BYTES,
    way: Way | None = None,
    precision: Precision = DEFAULT,
) -> Sweep:
    """Prunes ``model`` at rising thresholds and measures what clean accuracy is left.

    What the layers before the first newly pruned filter say of the images is kept from threshold to threshold, not
    computed again; the accuracies are those of plain pruning and predicting to the last bit.

    Args:
        masks: group name -> mask per filter; pruned are those at or below the threshold.
        sets: clean images, each set measured for itself: one small set alone lets a threshold through by luck when many
            are tried. Nothing else is looked at.
        thresholds: in rising order; one that prunes the same filters as the last is not evaluated again.
        max_drop: fall of clean accuracy, in [0, 1], that ``stop_early`` goes by.
        stop_early: stop at the first threshold that costs more than ``max_drop``; otherwise look at all of them,
            because a filter whose loss hurts alone may be no loss together with those that worked against it.
        hopeless: a point that costs more than this on one set is not measured on those that follow.
        cache_bytes: memory for what is kept; 0 keeps nothing.
        way: ``loop`` takes one threshold after another; ``stack`` all of them at once, as masks of one network, which
            is the same but for float32 rounding. None is the loop on a CPU and what :func:`sweep_path` finds elsewhere;
            a sweep that may stop early is always a loop, and so is that of a network that cannot be stacked.
        precision: whether convs run by Winograd's algorithm (``winograd``, ``auto``); a sweep is always float32.
    """
    course = _Course(sets, thresholds, max_drop, mode, stop_early, hopeless)
    (steps,), step_of = _steps([masks], thresholds)
    if way is None and model.device.type != "cpu" and not stop_early:
        way = sweep_path([model], [steps], sets[0].images, mode).path
    if way == "stack" and not stop_early:
        together = in_one_stack([model], [steps], course.images, mode)
        if together is not None:
            return _swept(together, [steps], step_of, course)[0]
    with convs_of(precision):
        alone = PrunedPredictions(model, course.images, steps, mode, cache_bytes)
        return _swept([alone.predict], [steps], step_of, course)[0]


def sweep_models(
    models: Sequence[Model],
    masks: Sequence[Masks],
    sets: Sequence[CleanData],
    thresholds: Sequence[float],
    max_drop: float,
    mode: PruneMode,
    stop_early: bool = True,
    hopeless: float = 1.0,
    memory: int = CACHE_BYTES,
    way: Way | None = None,
    precision: Precision = DEFAULT,
) -> list[Sweep]:
    """The sweep of every model with its own mask, as :func:`sweep_thresholds` makes it of each.

    Args:
        memory: bytes for what a loop keeps, or for the weights of the models that are swept in one stack: those for
            which there is no room come in a stack after it.
        way: ``loop`` takes one model after another; ``stack`` takes all at the same thresholds, each in one pass, which
            is the same but for images whose two largest logits are within float32 rounding of each other. None is the
            loop on a CPU, which goes on from feature maps that it has kept, and what :func:`sweep_path` finds
            elsewhere; models that cannot be stacked are always a loop.
        precision: of a loop, as there.
    """
    course = _Course(sets, thresholds, max_drop, mode, stop_early, hopeless)
    room = max(1, memory // weight_bytes(models[0]))
    found: list[Sweep] = []
    for start in range(0, len(models), room):
        some, own = models[start : start + room], masks[start : start + room]
        steps, step_of = _steps(own, thresholds)
        if way is None:
            on_cpu = models[0].device.type == "cpu"
            way = "loop" if on_cpu else sweep_path(some, steps, sets[0].images, mode, stop_early).path
        together = None
        if way == "stack" and len(some) > 1:
            together = in_one_stack(some, steps, course.images, mode, memory, one_step=stop_early)
        if together is not None:
            found += _swept(together, steps, step_of, course)
        else:
            rest = (sets, thresholds, max_drop, mode, stop_early, hopeless, memory, None, precision)
            found += [sweep_thresholds(model, mask, *rest) for model, mask in zip(some, own, strict=True)]
    return found


def _steps(masks: Sequence[Masks], thresholds: Sequence[float]) -> tuple[list[Steps], list[int]]:
    """The prunings of every model, none at all first, and for each threshold which of them is its own.

    All have one more where that of some model changes.
    """
    steps = [[dict[str, list[int]]() for _ in masks]]
    step_of: list[int] = []
    for threshold in thresholds:
        pruned = [below(own, threshold) for own in masks]
        if pruned != steps[-1]:
            steps.append(pruned)
        step_of.append(len(steps) - 1)
    return [list(own) for own in zip(*steps, strict=True)], step_of


def _swept(
    predict: Sequence[Predict], prunings: Sequence[Steps], step_of: Sequence[int], course: _Course
) -> list[Sweep]:
    """The sweep of every model, all at one threshold before the next: so a stack can take it for all of them."""
    before = [[share_right(one(0, index), data.labels) for one in predict] for index, data in enumerate(course.sets)]
    accuracies = list(zip(*before, strict=True))
    sweeps = [_points(*one, step_of, course) for one in zip(predict, prunings, accuracies, strict=True)]
    points: list[list[SweepPoint]] = [[] for _ in sweeps]
    for at_one_threshold in zip_longest(*sweeps):
        for so_far, point in zip(points, at_one_threshold, strict=True):
            so_far += [point] if point else []
    return [Sweep(first[0], tuple(own)) for first, own in zip(accuracies, points, strict=True)]


def _points(
    predict: Predict, steps: Steps, before: Sequence[float], step_of: Sequence[int], course: _Course
) -> Iterator[SweepPoint]:
    """A point for each threshold, up to where the sweep stops."""
    point: SweepPoint | None = None
    for threshold, step in zip(course.thresholds, step_of, strict=True):
        if point and steps[step] == point.pruned:
            point = replace(point, threshold=threshold)
        else:
            drops = _drops(partial(predict, step), before, course)
            point = SweepPoint(threshold, before[0] - drops[0], max(drops), steps[step])
        yield point
        if course.stop_early and point.drop > course.max_drop:
            return


def _drops(predict: Callable[[int], Tensor], before: Sequence[float], course: _Course) -> list[float]:
    """Fall of clean accuracy on each set, up to the first set on which it is hopeless."""
    drops: list[float] = []
    for index, (data, accuracy) in enumerate(zip(course.sets, before, strict=True)):
        drops.append(accuracy - share_right(predict(index), data.labels))
        if drops[-1] > course.hopeless:
            break
    return drops
