"""Finds every state dict in a checkpoint, checks its tensors, and converts them to the types of a network."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from bdprune.errors import ArtifactError, NoWeightsError, UnsupportedError
from bdprune.files.pickle_claims import TensorClaim
from bdprune.files.quoting import quoted
from bdprune.files.stored import StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# In order of preference: trained weights before averaged weights.
# fmt: off
WRAPPERS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "net_state_dict",
    "network_state_dict", "weights", "params", "netC", "classifier", "backbone", "module", "model_ema",
    "state_dict_ema", "ema_state_dict", "ema", "ema_model",
)
# fmt: on
# Entries that averaging and profilers add to the weights; not part of any network.
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
        paths: its places; more than one if the checkpoint holds the same dict several times.
        state: the state dict as stored: names to tensors, and any other entries.
    """

    paths: tuple[Path, ...]
    state: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its first path joined by ``/``; empty if it is the checkpoint itself."""
        return join_path(self.paths[0])

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors that may belong to a network, in order; all names in a network are strings."""
        items = ((key, value) for key, value in self.state.items() if isinstance(key, str) and is_tensor(value))
        return {key: value for key, value in items if key.rpartition(".")[2] not in _COUNTERS}


@dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint.

    Attributes:
        states: its state dicts, the preferred one first.
        outside: names of weights outside of them, such as a list of averaged tensors.
        optimisers: paths of the states of optimisers, joined by ``/``; their tensors are not weights.
    """

    states: tuple[StateDict, ...]
    outside: tuple[str, ...] = ()
    optimisers: tuple[str, ...] = ()


def contents_of(checkpoint: object) -> Contents:
    """Every state dict in ``checkpoint``, at any depth, and the weights outside of them.

    Raises:
        NoWeightsError: it holds no weights, such as the state of an optimiser.
        UnsupportedError: it holds weights but no state dict, or is nested too deeply.
    """
    search = _Search()
    search.visit(checkpoint)
    found = search.states or search.others
    outside = list(search.outside)
    if search.states:  # next to certain state dicts, uncertain ones are only named
        outside += [
            f"{state.name or 'the checkpoint itself'}: {len(state.tensors())} tensors"
            for state in search.others.values()
            if _is_network(state)
        ]
    states = sorted(found.values(), key=lambda state: _rank(state.paths[0]))
    if not states and not outside:
        raise NoWeightsError(
            f"it has no weights of a network, only {_what_else(checkpoint, search.optimisers)}.", _SAVE_STATE
        )
    if not states:
        kind = _keys_of(checkpoint) if isinstance(checkpoint, dict) else f"a {type(checkpoint).__name__}"
        raise UnsupportedError(f"it has no state dict, only {kind}.", _SAVE_STATE)
    return Contents(tuple(states), tuple(outside), tuple(search.optimisers))


class _Search:
    """A breadth-first walk through nested dicts and lists; a pickle may hold one dict many times, or in itself."""

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
            numbered = [key for key, value in node.items() if not isinstance(key, str) and _is_weight(value)]
            self._note([join_path((*path, key)) for key in numbered], node)
        elif not of_optimiser:
            single = [key for key, value in node.items() if _is_kernel(value) or _is_flat(value)]
            self._note([join_path((*path, key)) for key in single])

    def _visit_list(self, path: Path, node: object) -> None:
        values = node if isinstance(node, list | tuple) else ()
        named = [value[1] if _is_pair(value) else value for value in values]
        weights = [index for index, value in enumerate(named) if _is_weight(value)]
        if len(weights) > 1:  # a single matrix counts as a measurement, several as the parameters of a network
            self._note([f"{join_path(path)}[{index}]" for index in weights])
        self._note([f"{join_path(path)}[{index}]" for index, value in enumerate(named) if _is_flat(value)])

    def _note(self, names: list[str], node: object = None) -> None:
        if node is not None and self._visits[id(node)] > 1:
            return  # a loop, already visited
        self.outside += [quoted(name, 120).strip("'") for name in names[: _MAX_NAMED - len(self.outside)]]

    def _check_forgotten(self, node: object) -> None:
        if id(node) in self.states or id(node) in self.others:
            raise UnsupportedError(f"it holds one state dict in more than {_MOST_PLACES} places.", _SAVE_STATE)


def join_path(path: tuple[object, ...]) -> str:
    """The keys that lead to a state dict, joined by ``/``, for display and for ``state_key``."""
    return "/".join(map(str, path))


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether ``value`` is a tensor of torch, or one that is still in its file.

    It does not import torch: without it there are no tensors of torch.
    """
    if isinstance(value, TensorClaim | StoredTensor):
        return True
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_weight_name(name: str, tensor: Tensor) -> bool:
    """Whether a tensor outside a network may hold weights: a kernel, a ``weight`` that is a matrix, or a vector as long
    as a network's parameters. Means and deviations of a normalisation and weights of a loss do not count.
    """
    named = "weight" in name.rpartition(".")[2] and _is_weight(tensor) and len(tensor) > 1
    return named or _is_kernel(tensor) or _is_flat(tensor)


def check_expansion(tensors: Mapping[str, Tensor], file_bytes: int) -> None:
    """Checks that the total size of ``tensors`` is in proportion to their file.

    Raises:
        ArtifactError: it is too large, for example if one small storage has thousands of names.
    """
    total = sum(tensor.numel() for tensor in tensors.values())
    if total > _EXPANSION * file_bytes:
        hint = "The file is damaged or hostile; download it again from a source you trust."
        raise ArtifactError(f"its tensors claim {total} elements in a file of {file_bytes} bytes.", hint)


def with_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of ``tensor`` in the network's type, with its own memory.

    Raises:
        ArtifactError: the tensor is quantised, complex or sparse, or has integers where the network has floats.
    """
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        raise ArtifactError(f"the tensor {quoted(name)} is {tensor.dtype}, {tensor.layout}.", _SAVE_STATE)
    if dtype.is_floating_point and not tensor.is_floating_point():
        raise ArtifactError(
            f"the tensor {quoted(name)} of shape {tuple(tensor.shape)} holds integers ({tensor.dtype}), "
            "so the model is quantised.",
            "Give the float32 checkpoint from before quantisation.",
        )
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Checks that weights and statistics are finite, and that no variance is negative.

    Raises:
        ArtifactError: a value is invalid.
    """
    broken = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors.items() if not _is_finite(tensor)}
    if broken:
        name, count = next(iter(broken.items()))
        more = f" (and {len(broken) - 1} more tensors)" if len(broken) > 1 else ""
        raise ArtifactError(
            f"{count} of {tensors[name].numel()} values of the tensor {quoted(name)} are NaN or infinite{more}.",
            "The training diverged or the file is damaged; give an earlier checkpoint.",
        )
    for name, tensor in tensors.items():
        if name.endswith("running_var") and (tensor < 0).any():
            raise ArtifactError(f"the variance {quoted(name)} is negative.", "The file is damaged; download it again.")


def _containers(node: object) -> list[tuple[Any, object]]:
    """Dicts and lists in ``node``, each with its key or index."""
    pairs: Iterable[tuple[Any, object]] = ()
    if isinstance(node, dict):
        pairs = node.items()
    elif isinstance(node, list | tuple):
        pairs = enumerate(node)
    return [(key, value) for key, value in pairs if isinstance(value, dict | list | tuple) and value]


def _is_state(node: Mapping[Any, Any]) -> bool:
    """Whether an entry is a weight with at least two dimensions."""
    return any(
        isinstance(key, str)
        and is_tensor(value)
        and value.ndim >= 2
        and any(part.startswith("weight") for part in key.split("."))
        for key, value in node.items()
    )


def _may_be_state(node: Mapping[Any, Any]) -> bool:
    """Whether a dict holds several named float tensors, one of them a matrix: a network with unusual names."""
    floating = [value for key, value in node.items() if isinstance(key, str) and _is_float(value)]
    return len(floating) > 1 and any(value.ndim >= 2 for value in floating)


def _is_network(state: StateDict) -> bool:
    """Whether a possible state dict has two matrices or a kernel; a single matrix counts as a measurement."""
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
    """Whether this vector may hold all parameters of a network."""
    return _is_float(value) and value.ndim == 1 and value.numel() >= _SMALLEST_FLAT


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[0], str)


def _rank(path: Path) -> tuple[int, ...]:
    return tuple(WRAPPERS.index(key) if key in WRAPPERS else len(WRAPPERS) for key in path)


def _keys_of(checkpoint: Mapping[Any, Any]) -> str:
    names = ", ".join(quoted(key, 40) for key in list(checkpoint)[:5])
    return f"the keys {names}" if names else "an empty dict"


def _what_else(checkpoint: object, optimisers: list[str]) -> str:
    """A description of a checkpoint without weights."""
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
    """Whether all values are finite. It checks minimum and maximum, which is ten times faster than each value."""
    import torch

    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())
