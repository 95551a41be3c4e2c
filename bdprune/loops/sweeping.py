"""The threshold sweep: how far can filters be pruned before clean accuracy on held-out clean data gives way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import TypeAlias

from torch import Tensor

from bdprune.data import CleanData
from bdprune.loops.predictions import CACHE_BYTES, Predict, PrunedPredictions, Pruning, in_one_stack
from bdprune.model import Model, PruneMode
from bdprune.ops import Choice, fastest, settled
from bdprune.runtime import (
    BATCH,
    DEFAULT,
    STACK_OR_LOOP,
    WORTH,
    Precision,
    convs_of,
    describe,
    no_stack,
    power_of_two,
    share_right,
    weight_bytes,
)

Masks: TypeAlias = Mapping[str, Tensor]

_FEW_STEPS, _FEW_IMAGES = 5, 8  # of a trial on a CPU: little beside a sweep
_ENOUGH_MODELS = 4  # of a trial: with more of them a pass has no more images


@dataclass(frozen=True)
class SweepSettings:
    """How to sweep.

    Args:
        thresholds: in rising order; one that prunes the same filters as the last is not evaluated again.
        max_drop: fall of clean accuracy, in [0, 1], that ``stop_early`` goes by.
        mode: how a filter is pruned.
        stop_early: stop at the first threshold that costs more than ``max_drop``; otherwise look at all of them,
            because a filter whose loss hurts alone may be no loss together with those that worked against it.
        hopeless: a point that costs more than this on one set is not measured on those that follow.
    """

    thresholds: Sequence[float]
    max_drop: float
    mode: PruneMode = "zero_gamma"
    stop_early: bool = True
    hopeless: float = 1.0


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


def sweep(
    model: Model,
    masks: Masks,
    sets: Sequence[CleanData],
    settings: SweepSettings,
    precision: Precision = DEFAULT,
    variant: str | None = None,
    memory: int = CACHE_BYTES,
) -> Sweep:
    """Prunes ``model`` at rising thresholds and measures what clean accuracy is left.

    What the layers before the first newly pruned filter make of the images is kept from threshold to threshold, not
    computed again; the accuracies are those of plain pruning and predicting to the last bit.

    Args:
        masks: group name -> mask per filter; pruned are those at or below the threshold.
        sets: clean images, each set measured for itself: one small set alone lets a threshold through by luck when many
            are tried. Nothing else is looked at.
        precision: whether convs run by Winograd's algorithm (``winograd``, ``auto``); a sweep is always float32.
        variant: ``loop`` takes one threshold after another; ``stack`` all of them at once, as masks of one network,
            which is the same but for float32 rounding. None is the loop on a CPU and what :func:`sweep_variant` finds
            elsewhere; a sweep that may stop early is always a loop, and so is that of a network that cannot be stacked.
        memory: bytes for what a loop keeps; 0 keeps nothing.
    """
    task = _Task([model], [masks], sets, settings)
    if settings.stop_early:
        variant = "loop"
    stacked = task.in_one_stack(variant, memory)
    if stacked is not None:
        return task.swept(stacked)[0]
    with convs_of(precision):
        alone = PrunedPredictions(model, task.images, task.prunings[0], settings.mode, memory)
        return task.swept([alone.predict])[0]


def sweep_stack(
    models: Sequence[Model],
    masks: Sequence[Masks],
    sets: Sequence[CleanData],
    settings: SweepSettings,
    precision: Precision = DEFAULT,
    variant: str | None = None,
    memory: int = CACHE_BYTES,
) -> list[Sweep]:
    """The sweep of every model with its own mask, as :func:`sweep` makes it of each.

    Args:
        variant: ``loop`` takes one model after another; ``stack`` takes all at the same thresholds, each in one pass,
            which is the same but for images whose two largest logits are within float32 rounding of each other. None is
            the loop on a CPU, which goes on from feature maps that it has kept, and what :func:`sweep_variant` finds
            elsewhere; models that cannot be stacked are always a loop.
        memory: bytes for what a loop keeps, or for the weights of the models that are swept in one stack: those that do
            not fit come in a stack after it.
    """
    fit = max(1, memory // weight_bytes(models[0]))
    found: list[Sweep] = []
    for start in range(0, len(models), fit):
        some, own = models[start : start + fit], masks[start : start + fit]
        task = _Task(some, own, sets, settings)
        stacked = task.in_one_stack(variant, memory) if len(some) > 1 else None
        if stacked is not None:
            found += task.swept(stacked)
        else:
            found += [sweep(*one, sets, settings, precision, None, memory) for one in zip(some, own, strict=True)]
    return found


class _Task:
    """A sweep of models, each with its own masks.

    Attributes:
        prunings: of each model, none at all first; all have one more where that of some model changes.
    """

    def __init__(
        self, models: Sequence[Model], masks: Sequence[Masks], sets: Sequence[CleanData], settings: SweepSettings
    ) -> None:
        self._models, self._sets, self._settings = models, sets, settings
        steps = [[dict[str, list[int]]() for _ in masks]]
        self._step_of: list[int] = []  # of each threshold, among the prunings
        for threshold in settings.thresholds:
            pruned = [below(own, threshold) for own in masks]
            if pruned != steps[-1]:
                steps.append(pruned)
            self._step_of.append(len(steps) - 1)
        self.prunings = [list(own) for own in zip(*steps, strict=True)]

    @property
    def images(self) -> list[Tensor]:
        """Of every set."""
        return [data.images for data in self._sets]

    def in_one_stack(self, variant: str | None, memory: int) -> list[Predict] | None:
        """What each model predicts, by one stack of all; None where they are to be swept one after another."""
        models, settings = self._models, self._settings
        if variant is None and models[0].device.type != "cpu":
            variant = sweep_variant(models, self.prunings, self.images[0], settings.mode, settings.stop_early).winner
        if variant != "stack":
            return None
        return in_one_stack(models, self.prunings, self.images, settings.mode, memory, settings.stop_early)

    def swept(self, predict: Sequence[Predict]) -> list[Sweep]:
        """The sweep of every model, all at one threshold before the next: so a stack can take it for all of them."""
        before = [
            tuple(share_right(one(0, index), data.labels) for index, data in enumerate(self._sets)) for one in predict
        ]
        sweeps = [self._points(*one) for one in zip(predict, self.prunings, before, strict=True)]
        at_thresholds = list(zip_longest(*sweeps))
        return [
            Sweep(first[0], tuple(points[g] for points in at_thresholds if points[g])) for g, first in enumerate(before)
        ]

    def _points(
        self, predict: Predict, prunings: Sequence[dict[str, list[int]]], before: Sequence[float]
    ) -> Iterator[SweepPoint]:
        """A point for each threshold, up to where the sweep stops."""
        point: SweepPoint | None = None
        for threshold, step in zip(self._settings.thresholds, self._step_of, strict=True):
            if point and prunings[step] == point.pruned:
                point = replace(point, threshold=threshold)
            else:
                drops = self._drops(partial(predict, step), before)
                point = SweepPoint(threshold, before[0] - drops[0], max(drops), prunings[step])
            yield point
            if self._settings.stop_early and point.drop > self._settings.max_drop:
                return

    def _drops(self, predict: Callable[[int], Tensor], before: Sequence[float]) -> list[float]:
        """Fall of clean accuracy on each set, up to the first set on which it is hopeless."""
        drops: list[float] = []
        for index, (data, accuracy) in enumerate(zip(self._sets, before, strict=True)):
            drops.append(accuracy - share_right(predict(index), data.labels))
            if drops[-1] > self._settings.hopeless:
                break
        return drops


def sweep_variant(
    models: Sequence[Model],
    prunings: Sequence[Sequence[Pruning]],
    images: Tensor,
    mode: PruneMode,
    stop_early: bool = False,
) -> Choice:
    """Whether a sweep is faster in a stack: the tuner's question ``sweep``, tried on a part of it on a CPU.

    For one model the stack is of all its prunings, and the loop takes one after another. For several the stack is of
    all models, and the loop takes one after another, each by the variant that is faster for one. Three models go by
    two, and more than four by four. A stack that was faster for others of this shape may still be none: whoever makes
    it finds out.

    Args:
        prunings: of each model, one for each step of the sweep, none at all first.
        images: of the sweep, ``[N, C, H, W]``.
        stop_early: whether it may end at any step: then one model alone takes one after another.
    """
    models = power_of_two(models[:_ENOUGH_MODELS])
    prunings, images = prunings[: len(models)], images[:BATCH]
    device, count = models[0].device, len(prunings[0])
    if count == 1:
        return no_stack("sweep", models[0], "", "no threshold prunes anything")
    if len(models) == 1 and stop_early:
        return no_stack("sweep", models[0], "", "one model may stop at any threshold")
    if device.type == "cpu":
        prunings, images = [own[:: -(-count // _FEW_STEPS)] for own in prunings], images[:_FEW_IMAGES]
    several = f"{len(models)} x " if len(models) > 1 else ""
    early = ", which may stop early" if stop_early else ""
    shape = f"{len(prunings[0])} thresholds of {several}{describe(models[0])}, batch {list(images.shape)}{early}"
    known = settled("sweep", shape, device, STACK_OR_LOOP, "loop")
    if known is not None:
        return known

    def stacked(some: Sequence[Model], own: Sequence[Sequence[Pruning]]) -> list[Predict] | None:
        return in_one_stack(some, own, [images], mode, one_step=stop_early)

    if stacked(models, prunings) is None:
        return no_stack("sweep", models[0], shape, "the forward pass does more than its layers do")
    alone = "loop" if len(models) == 1 else sweep_variant(models[:1], prunings[:1], images, mode, stop_early).winner

    def one_by_one() -> None:
        for model, own in zip(models, prunings, strict=True):
            at_once = stacked([model], [own]) if alone == "stack" else None
            _run(at_once or [PrunedPredictions(model, [images], own, mode).predict], [own])

    variants = {"stack": lambda: _run(stacked(models, prunings), prunings), "loop": one_by_one}
    return fastest("sweep", shape, device, variants, default="loop", worth=WORTH)


def _run(predict: Sequence[Predict] | None, prunings: Sequence[Sequence[Pruning]]) -> None:
    """All predictions of a sweep for the first set."""
    for step in range(len(prunings[0])):
        for one in predict or ():
            one(step, 0)
