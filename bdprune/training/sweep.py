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
    """Clean accuracy without pruning, and the points in order of threshold."""

    accuracy_before: float
    points: tuple[SweepPoint, ...]

    def highest(self, max_drop: float) -> SweepPoint | None:
        """The point of the highest threshold that costs at most ``max_drop``, None when there is none."""
        fits = [point for point in self.points if self.accuracy_before - point.clean_accuracy <= max_drop]
        return fits[-1] if fits else None


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
    stop_early: bool = True,
) -> Sweep:
    """Prunes ``model`` at rising thresholds and measures what clean accuracy is left on ``data``.

    Args:
        masks: group name -> mask per filter; pruned are those at or below the threshold.
        data: held-out clean images; nothing else is looked at.
        thresholds: in rising order; one that prunes the same filters as the last is not evaluated again.
        max_drop: fall of clean accuracy, in [0, 1], that ``stop_early`` goes by.
        stop_early: stop at the first threshold that costs more than ``max_drop``; otherwise look at all of them,
            because a filter whose loss hurts alone may be no loss together with those that worked against it.
    """
    before = clean_accuracy(model.module, data.images, data.labels)
    points: list[SweepPoint] = []
    for threshold in thresholds:
        pruned = below(masks, threshold)
        if points and pruned == points[-1].pruned:
            accuracy = points[-1].clean_accuracy
        else:
            accuracy = clean_accuracy(prune(model, pruned, mode).module, data.images, data.labels)
        points.append(SweepPoint(threshold, accuracy, pruned))
        if stop_early and before - accuracy > max_drop:
            break
    return Sweep(before, tuple(points))
