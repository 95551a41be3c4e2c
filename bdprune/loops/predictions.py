"""Predictions under successive prunings: of one model from cached feature maps, or of many prunings as one stack."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from bdprune.model import (
    Model,
    Program,
    PruneMode,
    StackedNetwork,
    State,
    agrees,
    check_pruning,
    prune,
    prune_,
    pruned_parameters,
    why_not,
)
from bdprune.runtime import BATCH, predict, weight_bytes

CACHE_BYTES = 1 << 30
"""Memory limit for cached feature maps. A map of 500 images in the first stage of ResNet-18 takes 131 MB."""

Pruning = Mapping[str, Sequence[int]]
Predict = Callable[[int, int], Tensor]
"""Step and set -> labels ``[N]`` (int64, CPU) predicted for the set under the pruning of the step."""
_PROBE = 8  # images on which the program is compared with the network


class PrunedPredictions:
    """Predictions under ``prunings[0]``, ``prunings[1]``, ..., bit for bit those of ``prune(model, ...)``.

    Each forward pass starts where the network first differs from the previous passes: the feature maps at that point
    are cached, up to ``cache_bytes``. If the forward pass cannot be recorded as a list of steps, or the steps do not
    give the same bits, every pass runs from the start.

    Args:
        model: in eval mode; it does not change.
        sets: images ``[N, C, H, W]`` in [0, 1] of every set.
        prunings: group name -> indices of its pruned filters, in the order in which they will be used.
        mode: how a filter is pruned.
        cache_bytes: memory for feature maps, without the memory of the current batch.

    Raises:
        OptionError: an unknown mode, group or filter.
    """

    def __init__(
        self,
        model: Model,
        sets: Sequence[Tensor],
        prunings: Sequence[Pruning],
        mode: PruneMode,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        for pruning in prunings:
            check_pruning(model, pruning, mode)
        self._model, self._sets, self._prunings, self._mode = model, sets, prunings, mode
        self._worker = model.clone()
        self._states: dict[tuple[int, int], list[State]] = {}
        self._free = cache_bytes
        self._step = -1
        self._labels: dict[int, Tensor] = {}
        self._plain = model.module
        self._program, self._cuts = self._written_down()

    def predict(self, step: int, index: int) -> Tensor:
        """Labels ``[N]`` (int64, CPU) predicted for set ``index`` under ``prunings[step]``.

        ``step`` may stay the same or increase from call to call, but never decrease.
        """
        if step != self._step:
            self._go_to(step)
        if index not in self._labels:
            self._labels[index] = self._predict(index)
        return self._labels[index]

    def _predict(self, index: int) -> Tensor:
        images = self._sets[index]
        if self._program is None:
            return predict(self._plain, images)
        parts = [self._resumed((index, number), batch) for number, batch in enumerate(images.split(BATCH))]
        return torch.cat(parts)

    def _go_to(self, step: int) -> None:
        self._labels.clear()
        if self._program is None:
            self._plain = prune(self._model, self._prunings[step], self._mode).module
        else:
            self._set_worker(self._prunings[step])
            for cut in self._cuts[self._step + 1 : step + 1]:
                self._forget_after(cut)
        self._step = step

    @torch.no_grad()
    def _resumed(self, key: tuple[int, int], batch: Tensor) -> Tensor:
        assert self._program is not None
        kept = self._states.pop(key, [])
        start = kept[-1] if kept else None
        logits, made = self._program.run(batch.to(self._model.device), start, self._coming())
        self._free += sum(state.nbytes for state in kept)
        self._keep(key, kept + made)
        return logits.argmax(1).cpu()

    def _coming(self) -> set[int]:
        """The starting points of later passes that no earlier pruning changes."""
        places: set[int] = set()
        for cut in self._cuts[self._step + 1 :]:
            if not places or cut < min(places):
                places.add(cut)
        return places

    def _keep(self, key: tuple[int, int], states: list[State]) -> None:
        """Caches the states that fit, the deepest first because they are needed next. Skips overwritten states."""
        kept: list[State] = []
        for state in reversed(states):
            if state.intact and state.nbytes <= self._free:
                kept.insert(0, state)
                self._free -= state.nbytes
        self._states[key] = kept

    def _forget_after(self, position: int) -> None:
        """Drops the states that depend on a parameter which has changed."""
        for key, states in self._states.items():
            self._free += sum(state.nbytes for state in states if state.position > position)
            self._states[key] = [state for state in states if state.position <= position]

    @torch.no_grad()
    def _set_worker(self, pruning: Pruning) -> None:
        """Makes the worker equal to ``prune(model, pruning)``."""
        network, original = self._worker.network, self._model.network
        for group in self._model.groups:
            changed, values = (pruned_parameters(of, group, self._mode) for of in (network, original))
            for (parameter, _), (value, _) in zip(changed, values, strict=True):
                parameter.copy_(value)
        prune_(network, self._model.groups, pruning, self._mode)

    def _written_down(self) -> tuple[Program | None, list[int]]:
        """The worker's program, and for every step where its pass first differs from that of the step before.

        None if no program gives the network's bits with few and with many filters pruned, or if it does not show where
        it reads the pruned parameters.
        """
        if self._model.network.training:
            return None, []
        try:
            program = Program(self._worker.module)
            first = {name: self._first_read(program, name) for pruning in self._prunings for name in pruning}
            alike = all(self._alike(program, pruning) for pruning in (self._prunings[0], self._prunings[-1]))
        except Exception:  # any network may be passed, and fx may raise anything
            return None, []
        cuts = [0]
        for last, now in itertools.pairwise(self._prunings):
            changed = [first[name] for name in last.keys() | now.keys() if last.get(name) != now.get(name)]
            cuts.append(min(changed, default=len(program)))
        return (program, cuts) if alike else (None, [])

    def _first_read(self, program: Program, name: str) -> int:
        """The first step that reads a parameter changed by pruning group ``name``."""
        group = next(group for group in self._model.groups if group.name == name)
        parameters = pruned_parameters(self._worker.network, group, self._mode)
        places = [
            place for place in (program.first_read(parameter) for parameter, _ in parameters) if place is not None
        ]
        if len(places) < len(parameters):
            raise ValueError(f"the program never reads a parameter of {name}")
        return min(places)

    @torch.no_grad()
    def _alike(self, program: Program, pruning: Pruning) -> bool:
        """Whether ``program`` gives the bits of an ordinary pruned network on a few images."""
        images = self._sets[0][:_PROBE].to(self._model.device)
        self._set_worker(pruning)
        plain = prune(self._model, pruning, self._mode).module
        return torch.equal(program.run(images)[0], plain(images))


class StackedPredictions:
    """The predictions of :class:`PrunedPredictions` for each model, up to float32 rounding.

    For one model, layers that no pruning changes have one set of weights and run on the images of all prunings at once.

    Args:
        models: of one architecture, in eval mode; they do not change.
        prunings: of each model, one for each step: group name -> indices of its pruned filters, which include those of
            the previous step.
        sets: images ``[N, C, H, W]`` in [0, 1] of every set.
        mode: how a filter is pruned.
        at_once: steps of each model in one pass.

    Raises:
        OptionError: an unknown mode, group or filter.
        ValueError: the models cannot be stacked, or their forward pass does more than call their layers.
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
        changed = _pruned_layers(models[0], [pruning for own in prunings for pruning in own], mode) if is_one else None
        self._stacked = StackedNetwork([model for model in models for _ in range(at_once)], changed).eval()
        if not agrees(self._stacked):
            raise ValueError("the forward pass does more than call its layers")
        self._sets, self._prunings, self._mode, self._at_once = sets, prunings, mode, at_once
        self._pass = -1
        self._labels: dict[int, Tensor] = {}

    def predict(self, model: int, step: int, index: int) -> Tensor:
        """Labels ``[N]`` (int64, CPU) that ``models[model]`` predicts for set ``index`` under its pruning ``step``.

        Call it with increasing steps, and with all models for one step before the next step.
        """
        number, place = divmod(step, self._at_once)
        if number != self._pass:
            self._go_to(number)
        if index not in self._labels:
            self._labels[index] = self._predict(self._sets[index])
        return self._labels[index][model * self._at_once + place]

    def _go_to(self, number: int) -> None:
        """Prunes the stack up to the steps of that pass; if too few steps remain, repeats the last one."""
        assert number > self._pass, "pruning cannot be undone"
        first = number * self._at_once
        entries = [own[min(first + place, len(own) - 1)] for own in self._prunings for place in range(self._at_once)]
        _cut(self._stacked, entries, self._mode)
        self._labels.clear()
        self._pass = number

    @torch.no_grad()
    def _predict(self, images: Tensor) -> Tensor:
        """``[G, N]``; holds no more maps in memory than a pass of one model."""
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
    """The predictions of each model from one stack of all models; None if they cannot be stacked.

    One model takes all its steps in one pass. With several models, each takes one step in a pass, or more if a pass can
    take more images and their weights fit in ``memory`` bytes.

    Args:
        one_step: never take more than one step, because the next may not be needed.
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


def _pruned_layers(model: Model, prunings: Sequence[Pruning], mode: PruneMode) -> set[str]:
    """Paths of the layers in which any pruning sets parameters to zero."""
    names = {name for pruning in prunings for name in pruning}
    groups = [group for group in model.groups if group.name in names]
    changed = {id(one) for group in groups for one, _ in pruned_parameters(model.network, group, mode)}
    layers = model.network.named_modules()
    return {path for path, layer in layers if any(id(one) in changed for one in layer.parameters(recurse=False))}


@torch.no_grad()
def _cut(stacked: StackedNetwork, prunings: Sequence[Pruning], mode: PruneMode) -> None:
    """Prunes each entry of the stack in one operation: separate ones would be many and small."""
    for group in stacked.models[0].groups:
        filters = [pruning.get(group.name, ()) for pruning in prunings]
        entry = [g for g, own in enumerate(filters) for _ in own]
        if entry:
            channel = [index for own in filters for index in own]
            for parameter, start in pruned_parameters(stacked.network, group, mode):
                parameter[entry, [start + index for index in channel]] = 0
