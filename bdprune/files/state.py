"""Finds every state dict in a checkpoint, and turns tensors into finite ones of the types that a network has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from bdprune.errors import ArtifactError, NoWeightsError, UnsupportedError
from bdprune.files.quoting import quoted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# In order of preference: the weights as trained before their averages.
# fmt: off
WRAPPERS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "net_state_dict",
    "network_state_dict", "weights", "params", "netC", "classifier", "backbone", "module", "model_ema",
    "state_dict_ema", "ema_state_dict", "ema", "ema_model",
)
# fmt: on
# Written beside the weights by averaging and by profilers; not part of any network.
_COUNTERS = ("n_averaged", "total_ops", "total_params")
_MAX_DEPTH = 32
_SMALLEST_KERNEL = 9
_SMALLEST_FLAT = 10_000
_MOST_PLACES = 64
_GENERATORS = frozenset({"python", "numpy", "cpu", "cuda", "torch", "mlu", "musa", "npu", "xla", "rng_state"})
_MAX_NAMED = 200
_EXPANSION = 2
_SAVE_STATE = "Save the state dict: torch.save(model.state_dict(), path)."

Path = tuple[Any, ...]
"""Keys of dicts and indices of lists that lead to a state dict; empty for the checkpoint itself."""


@dataclass(frozen=True)
class StateDict:
    """A state dict inside a checkpoint.

    Attributes:
        paths: where it stands; more than one path where the checkpoint holds the very same dict several times.
        state: the state dict as stored: names to tensors, and whatever else stands among them.
    """

    paths: tuple[Path, ...]
    state: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its first path joined by ``/``; empty when it is the checkpoint itself."""
        return join_path(self.paths[0])

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors that may belong to a network, in order."""
        items = ((key, value) for key, value in self.state.items() if is_tensor(value))
        return {key: value for key, value in items if key.rpartition(".")[2] not in _COUNTERS}


@dataclass(frozen=True)
class Contents:
    """All that a checkpoint holds.

    Attributes:
        states: its state dicts, the preferred one first.
        outside: names of weights that stand outside of them, such as a list of averaged tensors.
        optimisers: paths of the states of optimisers, joined by ``/``; their tensors are not weights.
    """

    states: tuple[StateDict, ...]
    outside: tuple[str, ...] = ()
    optimisers: tuple[str, ...] = ()


def contents_of(checkpoint: object) -> Contents:
    """Every state dict in ``checkpoint``, wherever it stands, and the weights outside of them.

    Raises:
        NoWeightsError: it holds no weights at all, such as the state of an optimiser.
        UnsupportedError: it holds weights but no state dict, or is nested more deeply than any checkpoint.
    """
    search = _Search()
    search.visit(checkpoint)
    found = search.states or search.others
    outside = list(search.outside)
    if search.states:  # what only may be a state dict is named beside those that surely are
        outside += [
            f"{state.name or 'the checkpoint itself'}: {len(state.tensors())} tensors"
            for state in search.others.values()
            if _is_network(state)
        ]
    states = sorted(found.values(), key=lambda state: _rank(state.paths[0]))
    if not states and not outside:
        raise NoWeightsError(f"it holds no weights but {_what_else(checkpoint, search.optimisers)}.", _SAVE_STATE)
    if not states:
        kind = _keys_of(checkpoint) if isinstance(checkpoint, dict) else f"a {type(checkpoint).__name__}"
        raise UnsupportedError(f"it holds no state dict but {kind}.", _SAVE_STATE)
    return Contents(tuple(states), tuple(outside), tuple(search.optimisers))


class _Search:
    """A walk through nested dicts and lists, breadth first; a pickle may hold one dict many times, or itself."""

    def __init__(self) -> None:
        self.states: dict[int, StateDict] = {}
        self.others: dict[int, StateDict] = {}
        self.outside: list[str] = []
        self.optimisers: list[str] = []
        self._visits: Counter[int] = Counter()

    def visit(self, checkpoint: object) -> None:
        queue: list[tuple[Path, object, bool]] = [((), checkpoint, False)]
        for path, node, of_optimiser in queue:
            self._visits[id(node)] += 1
            if self._visits[id(node)] > _MOST_PLACES:
                self._check_forgotten(node)
                continue
            if isinstance(node, dict):
                self._visit_dict(path, node, of_optimiser)
            elif not of_optimiser:
                self._visit_list(path, node)
            below = _containers(node)
            if len(path) >= _MAX_DEPTH:
                self._note([f"{join_path((*path, key))} (nested too deeply)" for key, _ in below][:1], node)
                continue
            steps = _is_optimiser(node)
            queue += [((*path, key), value, of_optimiser or (steps and key == "state")) for key, value in below]

    def _visit_dict(self, path: Path, node: Mapping[Any, Any], of_optimiser: bool) -> None:
        if _is_optimiser(node):
            self.optimisers.append(join_path(path))
        kept = self.states if _is_state(node) else self.others if _may_be_state(node) and not of_optimiser else None
        if kept is not None:
            known = kept.get(id(node))
            kept[id(node)] = StateDict((*known.paths, path) if known else (path,), node)
        elif not of_optimiser:
            single = [key for key, value in node.items() if _is_kernel(value) or _is_flat(value)]
            self._note([join_path((*path, key)) for key in single])

    def _visit_list(self, path: Path, node: object) -> None:
        values = node if isinstance(node, list | tuple) else ()
        named = [value[1] if _is_pair(value) else value for value in values]
        weights = [index for index, value in enumerate(named) if _is_weight(value)]
        if len(weights) > 1:  # one matrix is a measurement, several are the parameters of a network
            self._note([f"{join_path(path)}[{index}]" for index in weights])
        self._note([f"{join_path(path)}[{index}]" for index, value in enumerate(named) if _is_flat(value)])

    def _note(self, names: list[str], node: object = None) -> None:
        if node is not None and self._visits[id(node)] > 1:
            return  # a loop, which has been looked at already
        self.outside += [quoted(name, 120).strip("'") for name in names[: _MAX_NAMED - len(self.outside)]]

    def _check_forgotten(self, node: object) -> None:
        if id(node) in self.states or id(node) in self.others:
            raise UnsupportedError(f"it holds one state dict in more than {_MOST_PLACES} places.", _SAVE_STATE)


def join_path(path: tuple[object, ...]) -> str:
    """Keys that lead to a state dict, as they are shown and chosen: with ``/`` between them."""
    return "/".join(map(str, path))


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether ``value`` is a tensor. Torch is imported only here and below: reading names takes none."""
    from torch import Tensor

    return isinstance(value, Tensor)


def is_weight_name(name: str, tensor: Tensor) -> bool:
    """Whether a tensor beside a network may hold weights of another: a kernel, a ``weight`` that is a matrix, or a
    vector as long as a network. Means and deviations of a normalisation and weights of a loss are none.
    """
    named = "weight" in name.rpartition(".")[2] and _is_weight(tensor) and len(tensor) > 1
    return named or _is_kernel(tensor) or _is_flat(tensor)


def check_expansion(tensors: Mapping[str, Tensor], file_bytes: int) -> None:
    """Makes sure that what ``tensors`` claim together is in proportion to the file that they came from.

    Raises:
        ArtifactError: it is not, as where one small storage stands under thousands of names.
    """
    total = sum(tensor.numel() for tensor in tensors.values())
    if total > _EXPANSION * file_bytes:
        hint = "The file is damaged or hostile; fetch it again from a source you trust."
        raise ArtifactError(f"its tensors claim {total} elements in a file of {file_bytes} bytes.", hint)


def with_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of ``tensor`` in the type that a network has for it, with memory of its own.

    Raises:
        ArtifactError: a quantised, complex or sparse tensor, or whole numbers where the network has fractions.
    """
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        raise ArtifactError(f"the tensor {quoted(name)} is {tensor.dtype}, {tensor.layout}.", _SAVE_STATE)
    if dtype.is_floating_point and not tensor.is_floating_point():
        raise ArtifactError(
            f"the tensor {quoted(name)} of shape {tuple(tensor.shape)} holds whole numbers ({tensor.dtype}), "
            "so the model is quantised.",
            "Give the float32 checkpoint from before quantisation.",
        )
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Makes sure that weights and statistics are numbers, and that no variance is negative.

    Raises:
        ArtifactError: they are not.
    """
    broken = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors.items() if not _is_finite(tensor)}
    if broken:
        name, count = next(iter(broken.items()))
        more = f"; so have {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        raise ArtifactError(
            f"the tensor {quoted(name)} has {count} of {tensors[name].numel()} values NaN or infinite{more}.",
            "The training diverged or the file is damaged; give an earlier checkpoint.",
        )
    for name, tensor in tensors.items():
        if name.endswith("running_var") and (tensor < 0).any():
            raise ArtifactError(f"the variance {quoted(name)} is negative.", "The file is damaged; fetch it again.")


def _containers(node: object) -> list[tuple[Any, object]]:
    """Dicts and lists in ``node``, each with the key or the index that leads there."""
    pairs: Iterable[tuple[Any, object]] = ()
    if isinstance(node, dict):
        pairs = node.items()
    elif isinstance(node, list | tuple):
        pairs = enumerate(node)
    return [(key, value) for key, value in pairs if isinstance(value, dict | list | tuple) and value]


def _is_state(node: Mapping[Any, Any]) -> bool:
    """Whether some entry is a weight of at least two dimensions."""
    return any(
        isinstance(key, str)
        and is_tensor(value)
        and value.ndim >= 2
        and any(part.startswith("weight") for part in key.split("."))
        for key, value in node.items()
    )


def _may_be_state(node: Mapping[Any, Any]) -> bool:
    """Whether a dict holds several named tensors of fractions, one a matrix: a network with names of its own."""
    floating = [value for key, value in node.items() if isinstance(key, str) and _is_float(value)]
    return len(floating) > 1 and any(value.ndim >= 2 for value in floating)


def _is_network(state: StateDict) -> bool:
    """Whether what may be a state dict has two matrices or a kernel; one matrix among numbers is a measurement."""
    tensors = list(state.tensors().values())
    return sum(_is_weight(tensor) for tensor in tensors) > 1 or any(map(_is_kernel, tensors))


def _is_optimiser(node: object) -> bool:
    if not isinstance(node, dict):
        return False
    return isinstance(node.get("state"), dict) and isinstance(node.get("param_groups"), list)


def _is_float(value: Any) -> bool:
    return is_tensor(value) and value.is_floating_point()


def _is_weight(value: Any) -> bool:
    return _is_float(value) and value.ndim >= 2


def _is_kernel(value: Any) -> bool:
    return _is_float(value) and value.ndim == 4 and value.numel() >= _SMALLEST_KERNEL


def _is_flat(value: Any) -> bool:
    """Whether all parameters of a network may have been written into this vector."""
    return _is_float(value) and value.ndim == 1 and value.numel() >= _SMALLEST_FLAT


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[0], str)


def _rank(path: Path) -> tuple[int, ...]:
    return tuple(WRAPPERS.index(key) if key in WRAPPERS else len(WRAPPERS) for key in path)


def _keys_of(checkpoint: Mapping[Any, Any]) -> str:
    names = ", ".join(quoted(key, 40) for key in list(checkpoint)[:5])
    return f"the keys {names}" if names else "an empty dict"


def _what_else(checkpoint: object, optimisers: list[str]) -> str:
    """What a checkpoint without weights is, in words."""
    if optimisers:
        return "the state of an optimiser"
    if not isinstance(checkpoint, dict):
        return f"a {type(checkpoint).__name__}"
    keys = {str(key) for key in checkpoint}
    if keys & {"last_epoch", "base_lrs", "_step_count"}:
        return "the state of a learning-rate scheduler"
    if keys <= _GENERATORS and keys:
        return "the state of random generators"
    return _keys_of(checkpoint)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are. The extremes pass on NaN, and are found ten times faster than each value is looked at."""
    import torch

    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())
