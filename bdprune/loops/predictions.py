"""Predictions under one pruning after another: of one model from kept feature maps, of many prunings as one stack."""

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
"""Memory that kept feature maps may take. A map of 500 images in the first stage of ResNet-18 takes 131 MB."""

Pruning = Mapping[str, Sequence[int]]
Predict = Callable[[int, int], Tensor]
"""Step and set -> labels ``[N]`` (int64, CPU) that are predicted for the set under the pruning of the step."""
_PROBE = 8  # images on which the program is held against the network


class PrunedPredictions:
    """Predictions under ``prunings[0]``, ``prunings[1]``, ..., the same bits as those of ``prune(model, ...)``.

    Each forward pass starts where the network first differs from those before: the feature maps there are kept, as far
    as they fit in ``cache_bytes``. Where the forward pass cannot be written down as a straight line, or the line does
    not give the same bits, every pass runs from the start.

    Args:
        model: in eval mode; it stays as it is.
        sets: images ``[N, C, H, W]`` in [0, 1] of every set.
        prunings: group name -> indices of its pruned filters, in the order in which they will be asked for.
        mode: how a filter is pruned.
        cache_bytes: memory for feature maps, not counting what the current batch takes.

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
        """Labels ``[N]`` (int64, CPU) that are predicted for set ``index`` under ``prunings[step]``.

        ``step`` may stay or rise from call to call, never fall.
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
        """Where later passes will start, of the places that no pruning before them changes."""
        places: set[int] = set()
        for cut in self._cuts[self._step + 1 :]:
            if not places or cut < min(places):
                places.add(cut)
        return places

    def _keep(self, key: tuple[int, int], states: list[State]) -> None:
        """Keeps what fits, the deepest first: that is needed next. A state that was written over is worth nothing."""
        kept: list[State] = []
        for state in reversed(states):
            if state.intact and state.nbytes <= self._free:
                kept.insert(0, state)
                self._free -= state.nbytes
        self._states[key] = kept

    def _forget_after(self, position: int) -> None:
        """Drops the states that have seen a parameter which has changed now."""
        for key, states in self._states.items():
            self._free += sum(state.nbytes for state in states if state.position > position)
            self._states[key] = [state for state in states if state.position <= position]

    @torch.no_grad()
    def _set_worker(self, pruning: Pruning) -> None:
        """Makes the worker what ``prune(model, pruning)`` is."""
        network, original = self._worker.network, self._model.network
        for group in self._model.groups:
            changed, values = (pruned_parameters(of, group, self._mode) for of in (network, original))
            for (parameter, _), (value, _) in zip(changed, values, strict=True):
                parameter.copy_(value)
        prune_(network, self._model.groups, pruning, self._mode)

    def _written_down(self) -> tuple[Program | None, list[int]]:
        """The worker's program, and for every step where its pass first differs from that of the step before.

        None where there is none that gives the network's bits with little and much pruned, or that shows where it reads
        what is pruned.
        """
        if self._model.network.training:
            return None, []
        try:
            program = Program(self._worker.module)
            first = {name: self._first_read(program, name) for pruning in self._prunings for name in pruning}
            alike = all(self._alike(program, pruning) for pruning in (self._prunings[0], self._prunings[-1]))
        except Exception:  # networks of any kind come here, and fx raises errors of any kind
            return None, []
        cuts = [0]
        for last, now in itertools.pairwise(self._prunings):
            changed = [first[name] for name in last.keys() | now.keys() if last.get(name) != now.get(name)]
            cuts.append(min(changed, default=len(program)))
        return (program, cuts) if alike else (None, [])

    def _first_read(self, program: Program, name: str) -> int:
        """The first step that reads what pruning group ``name`` changes."""
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
        """Whether ``program`` gives the bits of a plainly pruned network on a few images."""
        images = self._sets[0][:_PROBE].to(self._model.device)
        self._set_worker(pruning)
        plain = prune(self._model, pruning, self._mode).module
        return torch.equal(program.run(images)[0], plain(images))


class StackedPredictions:
    """What :class:`PrunedPredictions` predicts of each model, but for float32 rounding.

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

    One model takes all its steps in one pass. Of several, each takes one, or more where a pass can take more images
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
