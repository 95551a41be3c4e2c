"""The threshold sweep: how far can filters be pruned before clean accuracy on held-out clean data falls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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

_FEW_STEPS, _FEW_IMAGES = 5, 8  # of a trial on a CPU: little compared with a sweep
_ENOUGH_MODELS = 4  # of a trial: with more of them a pass has no more images


@dataclass(frozen=True)
class SweepSettings:
    """How to sweep.

    Args:
        thresholds: in rising order; one that prunes the same filters as the last is not evaluated again.
        max_drop: fall of clean accuracy, in [0, 1], that ``stop_early`` goes by.
        mode: how a filter is pruned.
        stop_early: stop at the first threshold that costs more than ``max_drop``; otherwise look at all of them,
            because losing one filter may hurt, and losing it with those that worked against it may not.
        hopeless: a point that costs more than this on one set is not measured on those that follow.
        variant: ``stack`` or ``loop``; None is the loop on a CPU, which goes on from feature maps that it has kept, and
            what a trial finds elsewhere. The stack is of all thresholds of one model, as masks of one network, or of
            several models, each at the same thresholds. It gives the same but for images whose two largest logits are
            within float32 rounding of each other. One model that may stop early, and what cannot be stacked, is always
            a loop.
        memory: bytes for what a loop keeps, 0 to keep nothing; or for the weights of the models in one stack: those
            that do not fit come in a stack after it.
    """

    thresholds: Sequence[float]
    max_drop: float
    mode: PruneMode = "zero_gamma"
    stop_early: bool = True
    hopeless: float = 1.0
    variant: str | None = None
    memory: int = CACHE_BYTES


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
    model: Model, masks: Masks, sets: Sequence[CleanData], settings: SweepSettings, precision: Precision = DEFAULT
) -> Sweep:
    """Prunes ``model`` at rising thresholds and measures what clean accuracy is left.

    What the layers before the first newly pruned filter make of the images is kept from threshold to threshold, not
    computed again; the accuracies are those of plain pruning and predicting to the last bit.

    Args:
        masks: group name -> mask per filter; pruned are those at or below the threshold.
        sets: clean images, each set measured for itself: one small set alone lets a threshold through by luck when many
            are tried. Nothing else is looked at.
        precision: whether convs run by Winograd's algorithm (``winograd``, ``auto``); a sweep is always float32.
    """
    return sweep_stack([model], [masks], sets, settings, precision)[0]


def sweep_stack(
    models: Sequence[Model],
    masks: Sequence[Masks],
    sets: Sequence[CleanData],
    settings: SweepSettings,
    precision: Precision = DEFAULT,
) -> list[Sweep]:
    """The sweep of every model with its own mask, as :func:`sweep` makes it of each."""
    fit = max(1, settings.memory // weight_bytes(models[0]))
    alone = replace(settings, variant=None)  # a model of several that is swept by itself goes by what suits one
    found: list[Sweep] = []
    if fit < len(models):
        for part in (slice(start, start + fit) for start in range(0, len(models), fit)):
            own = settings if len(models[part]) > 1 else alone
            found += sweep_stack(models[part], masks[part], sets, own, precision)
        return found
    task = _Task(models, masks, sets, settings)
    stacked = task.in_one_stack()
    if stacked is not None:
        return task.swept(stacked)
    if len(models) > 1:
        return [sweep(*one, sets, alone, precision) for one in zip(models, masks, strict=True)]
    with convs_of(precision):
        kept = PrunedPredictions(models[0], task.images, task.prunings[0], settings.mode, settings.memory)
        return task.swept([kept.predict])


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

    def in_one_stack(self) -> list[Predict] | None:
        """What each model predicts, by one stack of all; None where they are to be swept one after another."""
        models, settings, variant = self._models, self._settings, self._settings.variant
        if variant is None and models[0].device.type != "cpu":
            variant = sweep_variant(models, self.prunings, self.images[0], settings.mode, settings.stop_early).winner
        if variant != "stack" or (len(models) == 1 and settings.stop_early):
            return None
        return in_one_stack(models, self.prunings, self.images, settings.mode, settings.memory, settings.stop_early)

    def swept(self, predict: Sequence[Predict]) -> list[Sweep]:
        """The sweep of every model, all at one threshold before the next: so a stack can take it for all of them."""
        settings = self._settings
        before = [[share_right(one(0, k), data.labels) for k, data in enumerate(self._sets)] for one in predict]
        points: list[list[SweepPoint]] = [[] for _ in predict]
        for threshold, step in zip(settings.thresholds, self._step_of, strict=True):
            for one, prunings, first, own in zip(predict, self.prunings, before, points, strict=True):
                if own and settings.stop_early and own[-1].drop > settings.max_drop:
                    continue
                if own and prunings[step] == own[-1].pruned:
                    own.append(replace(own[-1], threshold=threshold))
                    continue
                drops = self._drops(partial(one, step), first)
                own.append(SweepPoint(threshold, first[0] - drops[0], max(drops), prunings[step]))
        return [Sweep(first[0], tuple(own)) for first, own in zip(before, points, strict=True)]

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
