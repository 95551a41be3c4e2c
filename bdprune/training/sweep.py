"""The threshold sweep: how far can filters be pruned before clean accuracy on held-out clean data gives way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from bdprune.data.clean import CleanData
from bdprune.model.handle import Model
from bdprune.model.prune import PruneMode, prune
from bdprune.training.evaluate import clean_accuracy


@dataclass(frozen=True)
class SweepPoint:
    """One threshold: the filters it prunes and the clean accuracy (in [0, 1]) that is left."""

    threshold: float
    clean_accuracy: float
    pruned: dict[str, list[int]]

    @property
    def filters_pruned(self) -> int:
        """Number of pruned filters."""
        return sum(map(len, self.pruned.values()))


@dataclass(frozen=True)
class Sweep:
    """Clean accuracy without pruning, the points in order of threshold, and the one that was chosen (None: no pruning).

    The rule is RNP's dynamic threshold: the highest one before the first whose drop is larger than allowed.
    """

    accuracy_before: float
    points: tuple[SweepPoint, ...]
    chosen: SweepPoint | None


def below(scores: Mapping[str, Tensor], threshold: float) -> dict[str, list[int]]:
    """Filters whose score is at or below ``threshold``; groups without one are left out."""
    hits = {name: (score <= threshold).nonzero().flatten().tolist() for name, score in scores.items()}
    return {name: index for name, index in hits.items() if index}


def sweep_thresholds(
    model: Model,
    masks: Mapping[str, Tensor],
    data: CleanData,
    thresholds: Sequence[float],
    max_drop: float,
    mode: PruneMode,
) -> Sweep:
    """Prunes ``model`` at rising thresholds until the clean accuracy on ``data`` falls by more than ``max_drop``.

    Args:
        masks: group name -> mask per filter; pruned are those at or below the threshold.
        data: held-out clean images; nothing else is looked at.
        thresholds: in rising order; one that prunes the same filters as the last is not evaluated again.
        max_drop: allowed fall of clean accuracy, in [0, 1].
    """
    before = clean_accuracy(model.module, data.images, data.labels)
    points: list[SweepPoint] = []
    chosen: SweepPoint | None = None
    for threshold in thresholds:
        pruned = below(masks, threshold)
        if points and pruned == points[-1].pruned:
            accuracy = points[-1].clean_accuracy
        else:
            accuracy = clean_accuracy(prune(model, pruned, mode).module, data.images, data.labels)
        points.append(SweepPoint(threshold, accuracy, pruned))
        if before - accuracy > max_drop:
            break
        chosen = points[-1]
    return Sweep(before, tuple(points), chosen)


def prune_guarded(
    model: Model, masks: Mapping[str, Tensor], data: CleanData, limit: float, max_drop: float, mode: PruneMode
) -> Sweep:
    """Prunes filters in rising order of their mask, and leaves alone those that clean accuracy cannot spare.

    One filter that the task needs, with a low mask, would stop a plain sweep early; here it is skipped. Filters are
    tried in runs; a run that costs too much is halved until the filter at fault is found.

    Args:
        masks: group name -> mask per filter.
        data: held-out clean images; nothing else is looked at.
        limit: filters with a mask above this are never pruned.
        max_drop: allowed fall of clean accuracy in all, in [0, 1].
        mode: how a filter is pruned.

    Returns:
        A sweep with a point for every run that was tried whole; the last point is the one that was chosen.
    """
    before = clean_accuracy(model.module, data.images, data.labels)
    order = sorted(
        (value, name, index)
        for name, mask in masks.items()
        for index, value in enumerate(mask.tolist())
        if value <= limit
    )
    taken: list[tuple[float, str, int]] = []
    accuracy = before
    points: list[SweepPoint] = []
    for start in range(0, len(order), _RUN):
        taken, accuracy = _take(model, taken, accuracy, order[start : start + _RUN], data, before - max_drop, mode)
        points.append(SweepPoint(order[min(start + _RUN, len(order)) - 1][0], accuracy, _by_group(taken)))
    return Sweep(before, tuple(points), points[-1] if points and taken else None)


_RUN = 8
_Filter = tuple[float, str, int]


def _take(
    model: Model,
    taken: list[_Filter],
    accuracy: float,
    run: list[_Filter],
    data: CleanData,
    floor: float,
    mode: PruneMode,
) -> tuple[list[_Filter], float]:
    """``taken`` and what of ``run`` can go with it, and the accuracy that is left; halves a run that costs too much."""
    tried = clean_accuracy(prune(model, _by_group([*taken, *run]), mode).module, data.images, data.labels)
    if tried >= floor:
        return [*taken, *run], tried
    if len(run) == 1:
        return taken, accuracy
    middle = len(run) // 2
    taken, accuracy = _take(model, taken, accuracy, run[:middle], data, floor, mode)
    return _take(model, taken, accuracy, run[middle:], data, floor, mode)


def _by_group(filters: Sequence[_Filter]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for _, name, index in filters:
        groups.setdefault(name, []).append(index)
    return {name: sorted(indices) for name, indices in groups.items()}
