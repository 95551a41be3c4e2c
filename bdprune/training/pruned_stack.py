"""Predictions of one model under many prunings at once: one network with G masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bdprune.model.handle import Model
from bdprune.model.prune import PruneMode, check, pruned_parameters
from bdprune.model.stacked import StackedNetwork, agrees, why_not
from bdprune.training.evaluate import BATCH
from bdprune.training.pruned import Pruning


class StackedPredictions:
    """What :class:`bdprune.training.pruned.PrunedPredictions` predicts, but for float32 rounding.

    Layers that no pruning touches have one set of weights, and run on the images of all prunings at once.

    Args:
        model: in eval mode; it stays as it is.
        sets: images ``[N, C, H, W]`` in [0, 1] of every set.
        prunings: group name -> indices of its pruned filters.
        mode: how a filter is pruned.

    Raises:
        OptionError: an unknown mode, group or filter.
        ValueError: the model's forward pass does more than its layers do, or they cannot be stacked.
    """

    def __init__(self, model: Model, sets: Sequence[Tensor], prunings: Sequence[Pruning], mode: PruneMode) -> None:
        for pruning in prunings:
            check(model, pruning, mode)
        objection = why_not([model])
        if objection:
            raise ValueError(objection)
        self._sets, self._labels = sets, dict[int, Tensor]()
        self._stacked = StackedNetwork([model] * len(prunings), _touched(model, prunings, mode)).eval()
        if not agrees(self._stacked):
            raise ValueError("the forward pass does more than its layers do")
        _cut(self._stacked, model, prunings, mode)

    def predict(self, step: int, index: int) -> Tensor:
        """Labels ``[N]`` (int64, CPU) that are predicted for set ``index`` under ``prunings[step]``."""
        if index not in self._labels:
            self._labels[index] = self._predict(self._sets[index])
        return self._labels[index][step]

    @torch.no_grad()
    def _predict(self, images: Tensor) -> Tensor:
        """``[G, N]``; as many maps are in memory at a time as in a pass of one model."""
        stack = len(self._stacked.models)
        parts = images.split(max(BATCH // stack, 1))
        device = self._stacked.models[0].device
        labels = [self._stacked(part.to(device)).argmax(2).cpu() for part in parts]
        return torch.cat(labels, 1) if labels else torch.empty(stack, 0, dtype=torch.int64)


def _touched(model: Model, prunings: Sequence[Pruning], mode: PruneMode) -> set[str]:
    """Paths of the layers in which some pruning sets something to zero."""
    names = {name for pruning in prunings for name in pruning}
    groups = [group for group in model.groups if group.name in names]
    touched = {id(one) for group in groups for one, _ in pruned_parameters(model.network, group, mode)}
    layers = model.network.named_modules()
    return {path for path, layer in layers if any(id(one) in touched for one in layer.parameters(recurse=False))}


@torch.no_grad()
def _cut(stacked: StackedNetwork, model: Model, prunings: Sequence[Pruning], mode: PruneMode) -> None:
    for g, pruning in enumerate(prunings):
        for group in model.groups:
            if group.name in pruning:
                for parameter, start in pruned_parameters(stacked.network, group, mode):
                    parameter[g][[start + index for index in pruning[group.name]]] = 0
