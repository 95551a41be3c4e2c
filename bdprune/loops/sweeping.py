"""The threshold sweep: how many filters can be pruned before clean accuracy on held-out clean data falls."""

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
    within,
)

Masks: TypeAlias = Mapping[str, Tensor]

_FEW_STEPS, _FEW_IMAGES = 5, 8  # of a trial on a CPU: small compared with a sweep
_ENOUGH_MODELS = 4  # of a trial: with more models a pass has no more images


@dataclass(frozen=True)
class SweepSettings:
    """How to sweep.

    Args:
        thresholds: in rising order; a threshold that prunes the same filters as the previous one is not evaluated
            again.
        max_drop: maximum fall of clean accuracy, in [0, 1]; used by ``stop_early``.
        mode: how a filter is pruned.
        stop_early: stop at the first threshold that costs more than ``max_drop``. Otherwise evaluate all of them,
            because accuracy can recover at a higher threshold, when filters with opposite effects are pruned too.
        hopeless: a point that costs more than this on one set is not measured on the remaining sets.
        variant: ``stack`` or ``loop``. None takes the loop on a CPU, which reuses cached feature maps, and the result
            of a trial on a GPU. A stack holds all thresholds of one model, as masks of one network, or several models,
            each at the same thresholds. Results are the same except for images whose two largest logits are within
            float32 rounding of each other. A single model that may stop early, and models that cannot be stacked,
            always loop.
        memory: bytes for the cache of a loop, 0 for no cache; or for the weights of the models in one stack: the models
            that do not fit are stacked afterwards.
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
        clean_accuracy: accuracy after pruning on the first set of clean images, in [0, 1].
        drop: largest fall of clean accuracy over all sets, in [-1, 1].
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
        """The point with the highest threshold that costs at most ``max_drop``, None if there is none."""
        fits = [point for point in self.points if within(point.drop, max_drop)]
        return fits[-1] if fits else None


def below(scores: Masks, threshold: float) -> dict[str, list[int]]:
    """Filters whose score is at or below ``threshold``; omits groups without such filters."""
    hits = {name: (score <= threshold).nonzero().flatten().tolist() for name, score in scores.items()}
    return {name: index for name, index in hits.items() if index}


def sweep(
    model: Model, masks: Masks, sets: Sequence[CleanData], settings: SweepSettings, precision: Precision = DEFAULT
) -> Sweep:
    """Prunes ``model`` at rising thresholds and measures the remaining clean accuracy.

    Caches the inputs of the first newly pruned layer from threshold to threshold instead of computing them again. The
    accuracies are bit for bit those of plain pruning and predicting.

    Args:
        masks: group name -> mask per filter; filters at or below the threshold are pruned.
        sets: clean images; each set is measured separately, because a single small set lets a threshold pass by chance
            if many are tried. No other images are used.
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
    """The sweep of every model with its own mask; each result equals that of :func:`sweep`."""
    fit = max(1, settings.memory // weight_bytes(models[0]))
    alone = replace(settings, variant=None)  # a model swept separately uses the variant that suits one model
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
        prunings: of each model, starting with no pruning; every model has a new one whenever that of some model
            changes.
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
        """The images of every set."""
        return [data.images for data in self._sets]

    def in_one_stack(self) -> list[Predict] | None:
        """The predictions of each model from one stack of all models; None if they must be swept one after another."""
        models, settings, variant = self._models, self._settings, self._settings.variant
        if variant is None and models[0].device.type != "cpu":
            variant = sweep_variant(models, self.prunings, self.images[0], settings.mode, settings.stop_early).winner
        if variant != "stack" or (len(models) == 1 and settings.stop_early):
            return None
        return in_one_stack(models, self.prunings, self.images, settings.mode, settings.memory, settings.stop_early)

    def swept(self, predict: Sequence[Predict]) -> list[Sweep]:
        """The sweep of every model. All models take one threshold before the next, so that a stack can serve them."""
        settings = self._settings
        before = [[share_right(one(0, k), data.labels) for k, data in enumerate(self._sets)] for one in predict]
        points: list[list[SweepPoint]] = [[] for _ in predict]
        for threshold, step in zip(settings.thresholds, self._step_of, strict=True):
            for one, prunings, first, own in zip(predict, self.prunings, before, points, strict=True):
                if own and settings.stop_early and not within(own[-1].drop, settings.max_drop):
                    continue
                if own and prunings[step] == own[-1].pruned:
                    own.append(replace(own[-1], threshold=threshold))
                    continue
                drops = self._drops(partial(one, step), first)
                own.append(SweepPoint(threshold, first[0] - drops[0], max(drops), prunings[step]))
        return [Sweep(first[0], tuple(own)) for first, own in zip(before, points, strict=True)]

    def _drops(self, predict: Callable[[int], Tensor], before: Sequence[float]) -> list[float]:
        """Fall of clean accuracy on each set, up to the first set with a hopeless fall."""
        drops: list[float] = []
        for index, (data, accuracy) in enumerate(zip(self._sets, before, strict=True)):
            drops.append(accuracy - share_right(predict(index), data.labels))
            if not within(drops[-1], self._settings.hopeless):
                break
        return drops


def sweep_variant(
    models: Sequence[Model],
    prunings: Sequence[Sequence[Pruning]],
    images: Tensor,
    mode: PruneMode,
    stop_early: bool = False,
) -> Choice:
    """Whether a sweep is faster as a stack: the tuner's question ``sweep``, tried on a part of the sweep on a CPU.

    For one model, the stack holds all its prunings, and the loop takes one after another. For several models, the stack
    holds all models, and the loop takes one after another, each with the variant that is faster for one model. Three
    models use the answer for two, and more than four the answer for four. The answer ``stack`` may come from other
    models of this shape; the caller must still check that these models can be stacked.

    Args:
        prunings: of each model, one for each step of the sweep, starting with no pruning.
        images: images of the sweep, ``[N, C, H, W]``.
        stop_early: whether the sweep may end at any step: then a single model takes one step after another.
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
        return no_stack("sweep", models[0], shape, "the forward pass does more than call its layers")
    alone = "loop" if len(models) == 1 else sweep_variant(models[:1], prunings[:1], images, mode, stop_early).winner

    def one_by_one() -> None:
        for model, own in zip(models, prunings, strict=True):
            at_once = stacked([model], [own]) if alone == "stack" else None
            _run(at_once or [PrunedPredictions(model, [images], own, mode).predict], [own])

    variants = {"stack": lambda: _run(stacked(models, prunings), prunings), "loop": one_by_one}
    return fastest("sweep", shape, device, variants, default="loop", worth=WORTH)


def _run(predict: Sequence[Predict] | None, prunings: Sequence[Sequence[Pruning]]) -> None:
    """Runs all predictions of a sweep for the first set."""
    for step in range(len(prunings[0])):
        for one in predict or ():
            one(step, 0)
