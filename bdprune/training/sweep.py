"""The threshold sweep: how far can filters be pruned before clean accuracy on held-out clean data gives way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from torch import Tensor

from bdprune.data.clean import CleanData
from bdprune.model.handle import Model
from bdprune.model.prune import PruneMode
from bdprune.ops.trial import ROUNDS, least_seconds
from bdprune.training.evaluate import BATCH, share_right
from bdprune.training.paths import PathChoice, Way, describe, kept_or_tried
from bdprune.training.precision import DEFAULT, Precision, convs_of
from bdprune.training.pruned import CACHE_BYTES, PrunedPredictions
from bdprune.training.pruned_stack import StackedPredictions

Predictions: TypeAlias = PrunedPredictions | StackedPredictions

_FEW_STEPS, _FEW_IMAGES = 5, 8  # of a trial on a CPU: little beside a sweep


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


def below(scores: Mapping[str, Tensor], threshold: float) -> dict[str, list[int]]:
    """Filters whose score is at or below ``threshold``; groups without one are left out."""
    hits = {name: (score <= threshold).nonzero().flatten().tolist() for name, score in scores.items()}
    return {name: index for name, index in hits.items() if index}


def sweep_thresholds(
    model: Model,
    masks: Mapping[str, Tensor],
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
    steps, step_of = _steps(masks, thresholds)
    images = [data.images for data in sets]
    if way is None and model.device.type != "cpu" and not stop_early:
        way = sweep_path(model, masks, images[0], thresholds, mode).path
    predictions: Predictions | None = None
    if way == "stack" and not stop_early:
        predictions = _all_at_once(model, images, steps, mode)
    with convs_of(precision):
        predictions = predictions or PrunedPredictions(model, images, steps, mode, cache_bytes)
        before = [share_right(predictions.predict(0, index), data.labels) for index, data in enumerate(sets)]
        points: list[SweepPoint] = []
        for threshold, step in zip(thresholds, step_of, strict=True):
            if points and steps[step] == points[-1].pruned:
                points.append(replace(points[-1], threshold=threshold))
            else:
                drops = _drops(predictions, step, sets, before, hopeless)
                points.append(SweepPoint(threshold, before[0] - drops[0], max(drops), steps[step]))
            if stop_early and points[-1].drop > max_drop:
                break
        return Sweep(before[0], tuple(points))


def sweep_path(
    model: Model, masks: Mapping[str, Tensor], images: Tensor, thresholds: Sequence[float], mode: PruneMode
) -> PathChoice:
    """Whether a sweep of these thresholds is faster all at once; tried once for every shape, on a part of it on a CPU.

    Args:
        images: of the sweep, ``[N, C, H, W]``.
    """
    steps, _ = _steps(masks, thresholds)
    if len(steps) == 1:
        return PathChoice("loop", "", "", reason="no threshold prunes anything")
    if model.device.type == "cpu":
        steps, images = steps[:: -(-len(steps) // _FEW_STEPS)], images[:_FEW_IMAGES]
    images = images[:BATCH]
    shape = f"sweep of {len(steps)} x {describe(model)}, batch {list(images.shape)}"

    def trial() -> Sequence[float] | None:
        together = _all_at_once(model, [images], steps, mode)
        if together is None:
            return None

        def run(predictions: Callable[[], Predictions]) -> None:
            made = predictions()
            for step in range(len(steps)):
                made.predict(step, 0)

        at_once = partial(run, lambda: StackedPredictions(model, [images], steps, mode))
        one_by_one = partial(run, lambda: PrunedPredictions(model, [images], steps, mode))
        return least_seconds(model.device, ROUNDS, at_once, one_by_one)

    return kept_or_tried(model, shape, trial, lambda: _all_at_once(model, [images], steps, mode) is not None)


def _steps(masks: Mapping[str, Tensor], thresholds: Sequence[float]) -> tuple[list[dict[str, list[int]]], list[int]]:
    """Every different pruning, none at all first, and for each threshold which of them is its own."""
    steps: list[dict[str, list[int]]] = [{}]
    step_of: list[int] = []
    for threshold in thresholds:
        pruned = below(masks, threshold)
        if pruned != steps[-1]:
            steps.append(pruned)
        step_of.append(len(steps) - 1)
    return steps, step_of


def _all_at_once(
    model: Model, images: Sequence[Tensor], steps: Sequence[dict[str, list[int]]], mode: PruneMode
) -> StackedPredictions | None:
    """None for a network that cannot be stacked."""
    try:
        return StackedPredictions(model, images, steps, mode)
    except ValueError:
        return None


def _drops(
    predictions: Predictions, step: int, sets: Sequence[CleanData], before: Sequence[float], hopeless: float
) -> list[float]:
    """Fall of clean accuracy on each set, up to the first set on which it is hopeless."""
    drops: list[float] = []
    for index, (data, accuracy) in enumerate(zip(sets, before, strict=True)):
        drops.append(accuracy - share_right(predictions.predict(step, index), data.labels))
        if drops[-1] > hopeless:
            break
    return drops
