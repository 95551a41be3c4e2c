"""Training steps as CUDA graphs: recorded once for every batch shape, then launched in one call.

A step of a small network runs hundreds of kernels, each shorter than its launch. A graph launches the same kernels on
the same memory in one call, so its results equal those of the eager step. Shuffling and augmentation stay outside: a
graph would repeat their random numbers.

``BDPRUNE_GRAPHS=0`` runs every step eagerly; ``1``, the default, records steps on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bdprune import environment
from bdprune.errors import OptionError

Tensors: TypeAlias = tuple[Tensor, ...]

WARM_UPS = 3
"""Eager steps of a shape before it is recorded: libraries choose kernels, optimizers create their state."""

log = logging.getLogger(__name__)


class CudaRecorder:
    """CUDA graphs with shared memory: they are replayed one at a time, and their results are copied out.

    Tests use a recorder that works on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], Tensors]) -> Tensors:
        """Runs it on the stream of the recordings."""
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            outputs = run()
        current.wait_stream(self._side)
        return outputs

    def record(self, run: Callable[[], Tensors]) -> tuple[Callable[[], Any], Tensors]:
        """Records without running; returns the replay function and the tensors that a replay fills.

        Raises:
            RuntimeError: it does something that a graph cannot record.
        """
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, stream=self._side):
                outputs = run()
        finally:
            torch.cuda.set_stream(current)  # a failed recording leaves its own stream set
        return graph.replay, outputs

    def random_state(self) -> Tensor:
        """State of the device's random generator."""
        return torch.cuda.get_rng_state(self._device)


@dataclass
class _Shape:
    """One batch shape: the memory that its steps read, and its recording once it exists."""

    inputs: Tensors
    warm_ups: int = 0
    replay: Callable[[], Any] | None = None
    outputs: Tensors = ()


class Captured:
    """A step that is replayed from a recording if possible, and otherwise runs eagerly.

    Args:
        step: tensors in, tensors out. Any other state it changes in place, and it reads nothing back from the device. A
            step that draws random numbers is never recorded.
        recorder: None runs every step eagerly.
    """

    def __init__(self, step: Callable[..., Tensors], recorder: CudaRecorder | None) -> None:
        self._step, self._recorder = step, recorder
        self._shapes: dict[Any, _Shape] = {}

    def __call__(self, *inputs: Tensor) -> Tensors:
        """One step; the caller owns the results."""
        if self._recorder is None:
            return self._step(*inputs)
        key = tuple((one.shape, one.stride(), one.dtype) for one in inputs)
        if key not in self._shapes:
            self._shapes[key] = _Shape(tuple(torch.empty_like(one) for one in inputs))
        shape = self._shapes[key]
        for kept, one in zip(shape.inputs, inputs, strict=True):
            kept.copy_(one)
        if shape.warm_ups < WARM_UPS:
            return self._warmed_up(shape, self._recorder)
        if shape.replay is None and not self._recorded(shape, self._recorder):
            return self._step(*inputs)
        assert shape.replay is not None
        shape.replay()
        return tuple(one.clone() for one in shape.outputs)

    def _warmed_up(self, shape: _Shape, recorder: CudaRecorder) -> Tensors:
        before = recorder.random_state()
        outputs = recorder.warm_up(lambda: self._step(*shape.inputs))
        shape.warm_ups += 1
        if not torch.equal(before, recorder.random_state()):
            self._give_up()
        return outputs

    def _recorded(self, shape: _Shape, recorder: CudaRecorder) -> bool:
        try:
            shape.replay, shape.outputs = recorder.record(lambda: self._step(*shape.inputs))
        except RuntimeError:
            log.debug("a step cannot be recorded", exc_info=True)
            self._give_up()
            return False
        return True

    def _give_up(self) -> None:
        self._recorder = None
        self._shapes.clear()


def recorder_for(device: torch.device) -> CudaRecorder | None:
    """The recorder for steps on ``device``; None if they run eagerly.

    Raises:
        OptionError: ``BDPRUNE_GRAPHS`` is neither 0 nor 1.
    """
    wanted = environment.GRAPHS.get()
    if wanted not in ("0", "1"):
        raise OptionError(f"Unknown value of BDPRUNE_GRAPHS: {wanted!r}.", "Set it to 0 or 1.")
    return CudaRecorder(device) if wanted == "1" and device.type == "cuda" else None


def captured(step: Callable[..., Tensors], device: torch.device) -> Captured:
    """``step`` with CUDA graphs on a GPU, and unchanged elsewhere."""
    return Captured(step, recorder_for(device))
