"""Writes a model back as a drop-in checkpoint with the same format, wrapper, names, order, types and extra entries."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdprune.errors import OutputError
from bdprune.files import Artifact, Slot, description_path, dump_safetensors, dump_torch, with_values, write_atomically
from bdprune.model.description import encode_description
from bdprune.model.handle import Model


@dataclass(frozen=True)
class Written:
    """A written checkpoint.

    Attributes:
        path: where it is; the index, if sharded.
        bytes: size.
        sha256: as in ``Artifact``.
        description: the file next to it that describes its compact networks; None if all are whole.
    """

    path: Path
    bytes: int
    sha256: str
    description: Path | None = None


def save(model: Model | Sequence[Model], path: str | Path) -> Written:
    """Writes ``model`` to ``path``, in the format of the file it came from (safetensors if there is none).

    The file appears whole or not at all. Unchanged tensors are written bit for bit. A model from shards is written in
    shards if ``path`` ends in ``.index.json``, otherwise as one file. If channels were removed from the network, a
    description is written next to it (``PATH.arch.json``), without which the file cannot be loaded. Otherwise one that
    is there is removed, because it describes a file that was replaced.

    Args:
        model: one model, or several that were loaded from one file, each from its own set of weights.
        path: the new file, which must differ from the old one.

    Raises:
        OutputError: the path cannot be written, or is a file that the model was loaded from.
    """
    path, models = Path(path), [model] if isinstance(model, Model) else list(model)
    files = to_files(models, path)
    artifact = models[0].artifact
    sources = _sources(artifact) if artifact is not None else []
    for name in files:
        if any(same_file(name, source) for source in sources):
            raise is_the_input(name)
    compact = [one.compact for one in models if one.compact is not None]
    description = description_path(path) if compact else None
    if description is not None:
        write_atomically(description, encode_description(compact))
    digests = []
    for name, data in reversed(files.items()):  # the index comes last, so that it never names a missing file
        write_atomically(name, data)
        digests.append(hashlib.sha256(data))
    if description is None:
        _remove(description_path(path))
    digests.reverse()
    whole = hashlib.sha256(b"".join(one.digest() for one in digests)) if len(digests) > 1 else digests[0]
    return Written(path, sum(map(len, files.values())), whole.hexdigest(), description)


def _remove(description: Path) -> None:
    """Removes the description of a compact network that was replaced: it would be taken for that of the new file."""
    try:
        description.unlink(missing_ok=True)
    except OSError as error:
        why = f"{description} describes the file that was replaced, and cannot be removed: {error.strerror}."
        raise OutputError(why, "Remove it, or give another output path.") from error


def to_files(models: Sequence[Model], path: Path) -> dict[Path, bytes]:
    """The files of a checkpoint: one file, or an index and its shards, the index first."""
    artifact = models[0].artifact
    if artifact is None or not artifact.shards or not path.name.endswith(".index.json"):
        return {path: to_bytes(models)}
    state = _checkpoint(models)
    names = _shard_names(path, list(dict.fromkeys(artifact.shards.values())))
    homes = {key: names[home] for key, home in artifact.shards.items()}
    parts = {name: {key: state[key] for key, home in homes.items() if home == name} for name in names.values()}
    total = {"total_size": sum(tensor.nbytes for tensor in state.values())}
    index = {"metadata": {**artifact.index_metadata, **total}, "weight_map": homes}
    files = {path: (json.dumps(index, indent=2) + "\n").encode()}
    return files | {path.parent / name: _encoded(part, artifact) for name, part in parts.items()}


def _shard_names(index: Path, old: Sequence[str]) -> dict[str, str]:
    """Names of the new shards, from the name of their index: two models in one folder never share a shard."""
    suffix = os.path.splitext(old[0])[1]
    stem = index.name.removesuffix(".index.json").removesuffix(suffix)
    return {name: f"{stem}-{part:05d}-of-{len(old):05d}{suffix}" for part, name in enumerate(old, 1)}


def to_bytes(model: Model | Sequence[Model]) -> bytes:
    """The checkpoint file as bytes."""
    models = [model] if isinstance(model, Model) else list(model)
    artifact = models[0].artifact
    if artifact is None:
        return dump_safetensors(_tensors(models[0]), {})
    return _encoded(_checkpoint(models), artifact)


def is_the_input(path: Path) -> OutputError:
    """The error for an output that would overwrite the model."""
    return OutputError(f"{path} is the input checkpoint.", "Give another output path; the input is never overwritten.")


def same_file(path: Path, source: Path) -> bool:
    """Whether both paths lead to the same existing file."""
    try:
        return os.path.samefile(path, source)
    except OSError:
        return False


def _sources(artifact: Artifact) -> list[Path]:
    return [artifact.path, *(artifact.path.parent / name for name in set(artifact.shards.values()))]


def _encoded(checkpoint: Any, artifact: Artifact) -> bytes:
    if artifact.format == "safetensors":
        return dump_safetensors(checkpoint, artifact.metadata)
    return dump_torch(checkpoint, artifact.format == "torch-legacy")


def _checkpoint(models: Sequence[Model]) -> Any:
    """The checkpoint that the models came from, with their tensors in place of the old ones."""
    first = models[0].artifact
    assert first is not None
    checkpoint = first.checkpoint
    for model in models:
        assert model.artifact is not None
        checkpoint = with_values(checkpoint, model.artifact.places, _original_form(_tensors(model), model.artifact))
    return checkpoint


def _tensors(model: Model) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.network.state_dict().items()}


@torch.no_grad()
def rounded(model: Model) -> Model:
    """The model with the weights that its file can hold: half precision has fewer digits and a smaller range.

    A value outside of the range becomes the nearest one in it. The model is the same object if the file has all digits.
    """
    slots = model.artifact.slots.values() if model.artifact else ()
    halves = [one for one in slots if one.dtype.is_floating_point and one.dtype.itemsize < 4 and not one.is_mask]
    if not halves:
        return model
    copy = model.clone()
    state = copy.network.state_dict()
    for slot in halves:
        state[slot.name].copy_(_written(state[slot.name], slot))
    return copy


def _written(tensor: Tensor, slot: Slot) -> Tensor:
    """The tensor that a network gets from the file."""
    if slot.original is None or slot.mask is None:
        return _in_slot(tensor, slot)
    weight, mask = _unmasked(tensor, slot.original, slot.mask)
    return weight * mask.to(weight.dtype)


def _original_form(tensors: Mapping[str, Tensor], artifact: Artifact) -> dict[str, Tensor]:
    """The network's tensors with the keys and dtypes of the file."""
    return {key: _in_slot(tensors[slot.name], slot) for key, slot in artifact.slots.items()}


def _in_slot(tensor: Tensor, slot: Slot) -> Tensor:
    if slot.original is None:
        return _in_dtype(tensor, slot.dtype)
    if slot.mask is None:
        return _in_double(tensor, slot.original)
    return _unmasked(tensor, slot.original, slot.mask)[slot.is_mask]


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the dtype of the file; a finite value stays finite: float16 ends at 65504."""
    if not tensor.is_floating_point() or not dtype.is_floating_point or dtype.itemsize >= tensor.dtype.itemsize:
        return tensor.to(dtype)
    largest = torch.finfo(dtype).max
    return torch.where(tensor.isfinite(), tensor.clamp(-largest, largest), tensor).to(dtype)


def _in_double(tensor: Tensor, original: Tensor) -> Tensor:
    """The float64 original, except where its float32 copy changed."""
    return torch.where(tensor == original.to(torch.float32), original, tensor.to(torch.float64))


def _unmasked(tensor: Tensor, original: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A weight and its mask, whose product is ``tensor``; neither changes where the product did not."""
    factor = mask.to(original.dtype)
    changed = tensor != (original * factor).to(torch.float32)
    opened = changed & (factor == 0) & (tensor != 0)
    factor = torch.where(opened, torch.ones_like(factor), factor)
    divisor = torch.where(factor == 0, torch.ones_like(factor), factor)
    weight = _in_dtype(tensor.to(torch.promote_types(tensor.dtype, original.dtype)) / divisor, original.dtype)
    return torch.where(changed & (factor != 0), weight, original), factor.to(mask.dtype)
