"""Which way a threshold sweep is faster here: in one stack, or one after another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bdprune.loops.pruned import Predict, PrunedPredictions, Pruning
from bdprune.loops.pruned_stack import in_one_stack
from bdprune.model import Model, PruneMode
from bdprune.ops.trial import ROUNDS, least_seconds
from bdprune.runtime import BATCH, PathChoice, describe, kept_or_tried, power_of_two

_FEW_STEPS, _FEW_IMAGES = 5, 8  # of a trial on a CPU: little beside a sweep
_ENOUGH_MODELS = 4  # of a trial: with more of them a pass has no more images


def sweep_path(
    models: Sequence[Model],
    prunings: Sequence[Sequence[Pruning]],
    images: Tensor,
    mode: PruneMode,
    stop_early: bool = False,
) -> PathChoice:
    """Whether a sweep is faster in a stack; tried once for every shape, on a part of it on a CPU.

    For one model the stack is of all its prunings, and the loop takes one after another. For several the stack is of
    all models, and the loop takes one after another, each by the way that is faster for one. Three models go by two,
    and more than four by four. A stack that was faster for others of this shape may still be none: whoever makes it
    finds out.

    Args:
        prunings: of each model, one for each step of the sweep, none at all first.
        images: of the sweep, ``[N, C, H, W]``.
        stop_early: whether it may end at any step: then one model alone takes one after another.
    """
    models = power_of_two(models[:_ENOUGH_MODELS])
    prunings, images = prunings[: len(models)], images[:BATCH]
    count = len(prunings[0])
    if count == 1:
        return PathChoice("loop", "", "", reason="no threshold prunes anything")
    if len(models) == 1 and stop_early:
        return PathChoice("loop", "", "", reason="one model may stop at any threshold")
    if models[0].device.type == "cpu":
        prunings, images = [own[:: -(-count // _FEW_STEPS)] for own in prunings], images[:_FEW_IMAGES]

    def stacked(some: Sequence[Model], own: Sequence[Sequence[Pruning]]) -> list[Predict] | None:
        return in_one_stack(some, own, [images], mode, one_step=stop_early)

    def trial() -> Sequence[float] | None:
        if stacked(models, prunings) is None:
            return None
        alone = "loop" if len(models) == 1 else sweep_path(models[:1], prunings[:1], images, mode, stop_early).path

        def together() -> None:
            _run(stacked(models, prunings), prunings)

        def one_by_one() -> None:
            for model, own in zip(models, prunings, strict=True):
                at_once = stacked([model], [own]) if alone == "stack" else None
                _run(at_once or [PrunedPredictions(model, [images], own, mode).predict], [own])

        return least_seconds(models[0].device, ROUNDS, together, one_by_one)

    several = f"{len(models)} x " if len(models) > 1 else ""
    early = ", which may stop early" if stop_early else ""
    shape = f"sweep of {len(prunings[0])} x {several}{describe(models[0])}, batch {list(images.shape)}{early}"
    return kept_or_tried(models[0], shape, trial, lambda: True)


def _run(predict: Sequence[Predict] | None, prunings: Sequence[Sequence[Pruning]]) -> None:
    """All predictions of a sweep for the first set."""
    for step in range(len(prunings[0])):
        for one in predict or ():
            one(step, 0)
