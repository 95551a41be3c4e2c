"""A network's forward pass as a list of steps that can be resumed in the middle.

Two networks that differ only in a late layer compute the same values before it. ``torch.fx`` records the pass once; the
live values before a step can be kept, and a later run can resume from them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class State:
    """All values that the steps from ``position`` on still read.

    Attributes:
        position: index of the step before which the values were kept.
        values: values, by the step that computed them.
        versions: in-place operations on each tensor up to that point.
        nbytes: memory of the tensors; memory that two of them share counts once.
    """

    position: int
    values: dict[fx.Node, Any]
    versions: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, position: int, values: dict[fx.Node, Any]) -> State:
        """Keeps ``values`` themselves, without copying them."""
        tensors = _tensors(values)
        storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
        return cls(position, dict(values), tuple(t._version for t in tensors), sum(storages.values()))

    @property
    def intact(self) -> bool:
        """Whether no later step has overwritten a kept tensor."""
        return self.versions == tuple(tensor._version for tensor in _tensors(self.values))


class Program:
    """``module`` as a list of steps. Each run uses the current values of the parameters.

    Args:
        module: images -> logits, in eval mode. The values of its parameters may change in place afterwards, but no
            parameter may be replaced by another tensor.

    Raises:
        Exception: any error of ``torch.fx``, if the pass depends on its values or does not take exactly one input.
            Callers must have a fallback; the error does not help a user.
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
        """Index of the first step that reads ``parameter`` (the tensor object of the module itself), or None."""
        return self._reads.get(id(parameter))

    def run(self, images: Tensor, start: State | None = None, keep: Collection[int] = ()) -> tuple[Tensor, list[State]]:
        """Logits ``[N, K]``, and the states before the steps in ``keep`` that come after ``start``, in order.

        Args:
            images: ``[N, C, H, W]``; ignored if ``start`` is given.
            start: a state of the same images, kept when the steps before it had the same parameters as now.
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
        """For every step, the values that no later step reads. The last step's own value is the result."""
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
