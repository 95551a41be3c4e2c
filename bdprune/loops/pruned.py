"""Predictions of one model under one pruning after another, without computing twice what no pruning has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from bdprune.model import Model, Program, PruneMode, State, check_pruning, prune, prune_, pruned_parameters
from bdprune.runtime import BATCH, predict

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
        cache_bytes: memory for feature maps, beside what the batch in work takes.

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
        self._room = cache_bytes
        self._step = -1
        self._labels: dict[int, Tensor] = {}
        self._plain = model.module
        self._program = self._written_down()
        self._cuts = self._first_changes() if self._program else []

    @property
    def resumes(self) -> bool:
        """Whether a forward pass can start in the middle."""
        return self._program is not None

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
        self._room += sum(state.nbytes for state in kept)
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
            if state.intact and state.nbytes <= self._room:
                kept.insert(0, state)
                self._room -= state.nbytes
        self._states[key] = kept

    def _forget_after(self, position: int) -> None:
        """Drops the states that have seen a parameter which has changed now."""
        for key, states in self._states.items():
            self._room += sum(state.nbytes for state in states if state.position > position)
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

    def _written_down(self) -> Program | None:
        """The worker's program, None where there is none that gives the network's bits with little and much pruned."""
        if self._model.network.training:
            return None
        try:
            program = Program(self._worker.module)
            alike = all(self._alike(program, pruning) for pruning in (self._prunings[0], self._prunings[-1]))
        except Exception:  # networks of any kind come here, and fx raises errors of any kind
            return None
        return program if alike and all(self._places(program, name) for name in self._all_groups()) else None

    @torch.no_grad()
    def _alike(self, program: Program, pruning: Pruning) -> bool:
        """Whether ``program`` gives the bits of a plainly pruned network on a few images."""
        images = self._sets[0][:_PROBE].to(self._model.device)
        self._set_worker(pruning)
        plain = prune(self._model, pruning, self._mode).module
        return torch.equal(program.run(images)[0], plain(images))

    def _all_groups(self) -> set[str]:
        return {name for pruning in self._prunings for name in pruning}

    def _places(self, program: Program, name: str) -> list[int]:
        """Steps that first read what pruning group ``name`` changes; none where a parameter is never read as such."""
        group = next(group for group in self._model.groups if group.name == name)
        parameters = pruned_parameters(self._worker.network, group, self._mode)
        places = [program.first_read(parameter) for parameter, _ in parameters]
        return [place for place in places if place is not None] if None not in places else []

    def _first_changes(self) -> list[int]:
        """For every step, where its forward pass first differs from that of the step before; 0 for the first."""
        assert self._program is not None
        first = {name: min(self._places(self._program, name)) for name in self._all_groups()}
        cuts = [0]
        for last, now in zip(self._prunings, self._prunings[1:], strict=False):
            changed = [first[name] for name in last.keys() | now.keys() if last.get(name) != now.get(name)]
            cuts.append(min(changed, default=len(self._program)))
        return cuts
