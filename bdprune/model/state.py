"""Finds the state dict in a checkpoint, takes off prefixes, and turns it into finite float32 tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdprune.errors import ArtifactError, UnsupportedError
from bdprune.model.pickle_walk import shown

# In order of preference: the weights as trained before their averages.
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "net_state_dict",
    "network_state_dict",
    "weights",
    "params",
    "netC",
    "classifier",
    "backbone",
    "module",
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
    "ema",
    "ema_model",
)
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")
# Written beside the weights by averaging and by profilers; no part of any network.
_BYSTANDERS = ("n_averaged", "total_ops", "total_params")
_MAX_DEPTH = 3
_MAX_NODES = 10_000
_EXPANSION = 2
_STATE_MEND = "Save the state dict: torch.save(model.state_dict(), path)."


@dataclass(frozen=True)
class Found:
    """A state dict inside a checkpoint.

    Attributes:
        keys: path of keys that leads to it; empty when it is the checkpoint itself.
        state: the state dict as stored: names to tensors, and whatever else stands among them.
    """

    keys: tuple[str, ...]
    state: Mapping[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors that may belong to a network, in order."""
        items = ((key, value) for key, value in self.state.items() if isinstance(value, Tensor))
        return {key: value for key, value in items if key.rpartition(".")[2] not in _BYSTANDERS}


def find_state(checkpoint: object) -> Found:
    """The state dict in ``checkpoint``, wherever the usual wrappers put it.

    Raises:
        UnsupportedError: there is none.
        ArtifactError: there are several under names that do not say which is the model.
    """
    found = sorted(_states(checkpoint), key=lambda item: _rank(item.keys))
    if not found:
        kind = f"a {type(checkpoint).__name__}" if not isinstance(checkpoint, dict) else _keys_of(checkpoint)
        raise UnsupportedError(f"it holds no state dict but {kind}.", _STATE_MEND)
    if len(found) > 1 and _rank(found[0].keys) == _rank(found[1].keys):
        names = ", ".join(shown("/".join(item.keys)) for item in found[:5])
        raise ArtifactError(f"it holds {len(found)} state dicts: {names}.", "Save the one to be scanned on its own.")
    return found[0]


def prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    """Every prefix that could be taken off all names, from the empty one to the longest."""
    names = list(tensors)
    result = [""]
    while True:
        longer = [result[-1] + prefix for prefix in PREFIXES]
        shared = [prefix for prefix in longer if names and all(name.startswith(prefix) for name in names)]
        if not shared:
            return result
        result.append(shared[0])


def to_float32(tensors: Mapping[str, Tensor], file_bytes: int) -> dict[str, Tensor]:
    """Copies of ``tensors`` in float32 (counters stay whole numbers), each with memory of its own.

    Args:
        tensors: the tensors of a state dict.
        file_bytes: size of the file they came from; what they claim together must be in proportion.

    Raises:
        ArtifactError: quantised, complex, NaN or infinite weights, negative variances, or tensors that together are
            far larger than the file.
    """
    total = sum(tensor.numel() for tensor in tensors.values())
    if total > _EXPANSION * file_bytes:
        mend = "The file is damaged or hostile; fetch it again from a source you trust."
        raise ArtifactError(f"its tensors claim {total} elements in a file of {file_bytes} bytes.", mend)
    for name, tensor in tensors.items():
        _check_dtype(name, tensor)
    copies = {name: _copy(tensor) for name, tensor in tensors.items()}
    _check_finite(copies)
    return copies


def _states(checkpoint: object) -> Iterator[Found]:
    """Breadth first, each dict once (a pickle may hold the same one many times, or itself)."""
    queue: list[tuple[tuple[str, ...], object]] = [((), checkpoint)]
    seen: set[int] = set()
    for keys, node in queue:
        if not isinstance(node, dict) or id(node) in seen or len(seen) > _MAX_NODES:
            continue
        seen.add(id(node))
        if _is_state(node):
            yield Found(keys, node)
        elif len(keys) < _MAX_DEPTH:
            queue.extend(((*keys, key), value) for key, value in node.items() if isinstance(key, str))


def _is_state(node: Mapping[Any, Any]) -> bool:
    """Whether some entry is a weight of at least two dimensions."""
    return any(
        isinstance(key, str) and key.endswith("weight") and isinstance(value, Tensor) and value.ndim >= 2
        for key, value in node.items()
    )


def _rank(keys: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(WRAPPERS.index(key) if key in WRAPPERS else len(WRAPPERS) for key in keys)


def _keys_of(checkpoint: Mapping[Any, Any]) -> str:
    names = ", ".join(shown(key, 40) for key in list(checkpoint)[:5])
    return f"the keys {names}" if names else "an empty dict"


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        raise ArtifactError(f"the tensor {shown(name)} is {tensor.dtype}, {tensor.layout}.", _STATE_MEND)
    if not tensor.is_floating_point() and tensor.ndim > 0:
        raise ArtifactError(
            f"the tensor {shown(name)} of shape {tuple(tensor.shape)} holds whole numbers ({tensor.dtype}), "
            "so the model is quantised.",
            "Give the float32 checkpoint from before quantisation.",
        )


def _copy(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    broken = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors.items() if not _is_finite(tensor)}
    if broken:
        name, count = next(iter(broken.items()))
        more = f"; so have {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        raise ArtifactError(
            f"the tensor {shown(name)} has {count} of {tensors[name].numel()} values NaN or infinite{more}.",
            "The training diverged or the file is damaged; give an earlier checkpoint.",
        )
    for name, tensor in tensors.items():
        if name.endswith("running_var") and (tensor < 0).any():
            raise ArtifactError(f"the variance {shown(name)} is negative.", "The file is damaged; fetch it again.")


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are. The extremes pass on NaN, and are found ten times faster than each value is looked at."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())
