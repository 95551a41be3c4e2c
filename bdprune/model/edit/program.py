"""A network's forward pass as a straight line of steps that can be taken up in the middle.

Two networks that differ in a late layer alone share everything before it. So the pass is written down once by
``torch.fx``, and what is alive before some step can be kept and gone on from.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class State:
    """Everything that the steps from ``position`` on still read.

    Attributes:
        position: index of the step before which it was kept.
        values: by the step that made it.
        versions: in-place operations that each tensor had gone through by then.
        nbytes: memory that the tensors hold; what two of them share counts once.
    """

    position: int
    values: dict[fx.Node, Any]
    versions: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, position: int, values: dict[fx.Node, Any]) -> State:
        """Keeps ``values`` themselves, not copies."""
        tensors = _tensors(values)
        storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
        return cls(position, dict(values), tuple(t._version for t in tensors), sum(storages.values()))

    @property
    def intact(self) -> bool:
        """Whether no later step has written over a tensor that was kept."""
        return self.versions == tuple(tensor._version for tensor in _tensors(self.values))


class Program:
    """``module`` as a list of steps, with the parameters that it has at the time of each run.

    Args:
        module: images -> logits, in eval mode. The values of its parameters may change in place afterwards, but no
            parameter may be replaced by another tensor.

    Raises:
        Exception: whatever ``torch.fx`` raises where the pass depends on the values in it, or has not one input.
            Whoever asks must be able to do without; the error would tell a user nothing.
    """

    def __init__(self, module: nn.Module) -> None:
        graph = fx.Tracer().trace(module)
        self._interpreter = fx.Interpreter(module, graph=graph)
        self._steps = list(graph.nodes)
        if sum(step.op == "placeholder" for step in self._steps) != 1:
            raise ValueError("the forward pass takes more than one input")
        self._dead = self._last_uses()
        self._reads: dict[int, int] = {}
        for position, step in enumerate(self._steps):
            for tensor in _read(module, step):
                self._reads.setdefault(id(tensor), position)

    def __len__(self) -> int:
        return len(self._steps)

    def first_read(self, parameter: Tensor) -> int | None:
        """Index of the first step that reads ``parameter`` (the very tensor of the module), None where none does."""
        return self._reads.get(id(parameter))

    def run(self, images: Tensor, start: State | None = None, keep: Collection[int] = ()) -> tuple[Tensor, list[State]]:
        """Logits ``[N, K]``, and the states before those steps in ``keep`` that come after ``start``, in order.

        Args:
            images: ``[N, C, H, W]``; not looked at with a ``start``.
            start: a state of the same images, kept while the steps before it had the parameters that they have now.
        """
        values = dict(start.values) if start else {}
        first = start.position if start else 0
        states: list[State] = []
        self._interpreter.env = values
        for position, step in enumerate(self._steps[first:], first):
            if position in keep and (start is None or position > first):
                states.append(State.of(position, values))
            values[step] = images if step.op == "placeholder" else self._interpreter.run_node(step)
            for dead in self._dead[position]:
                del values[dead]
        logits: Tensor = values.pop(self._steps[-1])
        return logits, states

    def _last_uses(self) -> list[list[fx.Node]]:
        """For every step, the values that nothing after it reads. The last step's own is the result."""
        place = {step: position for position, step in enumerate(self._steps)}
        dead: list[list[fx.Node]] = [[] for _ in self._steps]
        for step, position in list(place.items())[:-1]:
            dead[max((place[user] for user in step.users), default=position)].append(step)
        return dead


def _read(module: nn.Module, step: fx.Node) -> list[Tensor]:
    """Parameters that ``step`` reads."""
    if step.op == "call_module":
        return list(module.get_submodule(str(step.target)).parameters())
    if step.op != "get_attr":
        return []
    path, _, name = str(step.target).rpartition(".")
    value = getattr(module.get_submodule(path), name)
    return [value] if isinstance(value, Tensor) else []


def _tensors(values: dict[fx.Node, Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(list(values.values())) if isinstance(leaf, Tensor)]
