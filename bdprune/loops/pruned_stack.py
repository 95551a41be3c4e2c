"""Predictions of many prunings, of one model or of several, at once: one network with a mask for each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from bdprune.loops.pruned import CACHE_BYTES, Predict, Pruning
from bdprune.model import Model, PruneMode, StackedNetwork, agrees, check_pruning, pruned_parameters, why_not
from bdprune.runtime import BATCH, weight_bytes


class StackedPredictions:
    """What :class:`bdprune.loops.pruned.PrunedPredictions` predicts of each model, but for float32 rounding.

    Where there is one model, layers that no pruning touches have one set of weights, and run on the images of all
    prunings at once.

    Args:
        models: of one architecture, in eval mode; they stay as they are.
        prunings: of each model, one for each step: group name -> indices of its pruned filters, all those of the step
            before among them.
        sets: images ``[N, C, H, W]`` in [0, 1] of every set.
        mode: how a filter is pruned.
        at_once: steps of each model in one pass.

    Raises:
        OptionError: an unknown mode, group or filter.
        ValueError: the models cannot be stacked, or their forward pass does more than their layers do.
    """

    def __init__(
        self,
        models: Sequence[Model],
        prunings: Sequence[Sequence[Pruning]],
        sets: Sequence[Tensor],
        mode: PruneMode,
        at_once: int = 1,
    ) -> None:
        for model, own in zip(models, prunings, strict=True):
            for pruning in own:
                check_pruning(model, pruning, mode)
        objection = why_not(models)
        if objection:
            raise ValueError(objection)
        is_one = all(model is models[0] for model in models)
        touched = _touched(models[0], [pruning for own in prunings for pruning in own], mode) if is_one else None
        self._stacked = StackedNetwork([model for model in models for _ in range(at_once)], touched).eval()
        if not agrees(self._stacked):
            raise ValueError("the forward pass does more than its layers do")
        self._sets, self._prunings, self._mode, self._at_once = sets, prunings, mode, at_once
        self._pass = -1
        self._labels: dict[int, Tensor] = {}

    def predict(self, model: int, step: int, index: int) -> Tensor:
        """Labels ``[N]`` (int64, CPU) that ``models[model]`` under its pruning ``step`` predicts for set ``index``.

        Steps are asked for as they rise, of all models each before the next.
        """
        number, place = divmod(step, self._at_once)
        if number != self._pass:
            self._go_to(number)
        if index not in self._labels:
            self._labels[index] = self._predict(self._sets[index])
        return self._labels[index][model * self._at_once + place]

    def _go_to(self, number: int) -> None:
        """Prunes the stack on to the steps of that pass; where too few are left, the last step is there again."""
        assert number > self._pass, "a filter that is pruned does not come back"
        first = number * self._at_once
        entries = [own[min(first + place, len(own) - 1)] for own in self._prunings for place in range(self._at_once)]
        _cut(self._stacked, entries, self._mode)
        self._labels.clear()
        self._pass = number

    @torch.no_grad()
    def _predict(self, images: Tensor) -> Tensor:
        """``[G, N]``; as many maps are in memory at a time as in a pass of one model."""
        stack = len(self._stacked.models)
        device = self._stacked.models[0].device
        labels = [self._stacked(part.to(device)).argmax(2) for part in images.split(max(BATCH // stack, 1))]
        return torch.cat(labels, 1).cpu() if labels else torch.empty(stack, 0, dtype=torch.int64)


def in_one_stack(
    models: Sequence[Model],
    prunings: Sequence[Sequence[Pruning]],
    sets: Sequence[Tensor],
    mode: PruneMode,
    memory: int = CACHE_BYTES,
    one_step: bool = False,
) -> list[Predict] | None:
    """What each model predicts, by one stack of all; None for networks that cannot be stacked.

    One model takes all its steps in one pass. Of several, each takes one, or more where a pass has room for more images
    and ``memory`` bytes for their weights.

    Args:
        one_step: never more than one, because the next may not be asked for.
    """
    at_once = len(prunings[0])
    if len(models) > 1:
        images = len(models) * max(map(len, sets), default=0)
        fit = min(BATCH // max(images, 1), memory // (len(models) * weight_bytes(models[0])))
        at_once = 1 if one_step else max(1, min(at_once, fit))
    try:
        stack = StackedPredictions(models, prunings, sets, mode, at_once)
    except ValueError:
        return None
    return [partial(stack.predict, model) for model in range(len(models))]


def _touched(model: Model, prunings: Sequence[Pruning], mode: PruneMode) -> set[str]:
    """Paths of the layers in which some pruning sets something to zero."""
    names = {name for pruning in prunings for name in pruning}
    groups = [group for group in model.groups if group.name in names]
    touched = {id(one) for group in groups for one, _ in pruned_parameters(model.network, group, mode)}
    layers = model.network.named_modules()
    return {path for path, layer in layers if any(id(one) in touched for one in layer.parameters(recurse=False))}


@torch.no_grad()
def _cut(stacked: StackedNetwork, prunings: Sequence[Pruning], mode: PruneMode) -> None:
    """Prunes each entry of the stack, all in one step: a step for each would be many small ones."""
    for group in stacked.models[0].groups:
        filters = [pruning.get(group.name, ()) for pruning in prunings]
        entry = [g for g, own in enumerate(filters) for _ in own]
        if entry:
            channel = [index for own in filters for index in own]
            for parameter, start in pruned_parameters(stacked.network, group, mode):
                parameter[entry, [start + index for index in channel]] = 0
