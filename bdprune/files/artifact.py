"""Opens a checkpoint: recognises its format, checks it in full, reads it, and keeps the data for writing it back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdprune.errors import ArtifactError, NoWeightsError, UnsupportedError
from bdprune.files import safetensors_file, torch_file
from bdprune.files.opening import GIVE_CHECKPOINT, MAX_FILE_BYTES, Format, opened
from bdprune.files.pickle_walk import MAX_PICKLE_BYTES
from bdprune.files.quoting import quoted
from bdprune.files.shards import GIVE_INDEX, MAX_INDEX_BYTES, shard_names
from bdprune.files.state import Contents, contents_of, is_tensor
from bdprune.files.state import Path as KeyPath

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """The place of one tensor of a network in the checkpoint.

    Attributes:
        name: of the tensor in the network.
        dtype: in the file.
        original: the values of the file if float32 cannot represent them (float64), or the unmasked weight if the file
            stores a weight and its mask separately; else None.
        mask: the mask that belongs to ``original``, or None.
        is_mask: whether this entry stores the mask itself.
    """

    name: str
    dtype: torch.dtype
    original: Tensor | None = None
    mask: Tensor | None = None
    is_mask: bool = False


@dataclass(frozen=True)
class Artifact:
    """The file of a model, and the data for writing it back.

    Attributes:
        path: the file; the index for a model in shards.
        format: ``torch-zip``, ``torch-legacy`` or ``safetensors``.
        bytes: size of the file, or of the index and all shards.
        sha256: digest of the file, hexadecimal; for shards, the digest of the digests of the index and of every shard.
        state_key: name of this set of weights inside the checkpoint; empty without other sets and wrappers.
        prefix: prefix of all names of the network in the state dict, such as ``module.``.
        sets: names of all sets of weights in the file.
        unscanned: names of weights outside the recognised networks.
        kept: names of entries without weights, which are written back unchanged.
        left_out: other sets of weights in the file that were not loaded, each with the reason.
        places: paths of keys to the state dict; several if the checkpoint holds the same dict several times.
        slots: keys of the state dict -> the tensor of the network that belongs there.
        checkpoint: the whole checkpoint, with None for each tensor that the network holds.
        metadata: of the safetensors header.
        shards: keys -> file of the tensor; empty for a single file.
        index_metadata: of the index of the shards.
    """

    path: Path
    format: Format
    bytes: int
    sha256: str
    state_key: str = ""
    prefix: str = ""
    sets: tuple[str, ...] = ()
    unscanned: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    places: tuple[KeyPath, ...] = ((),)
    slots: Mapping[str, Slot] = field(default_factory=dict, repr=False, compare=False)
    checkpoint: Any = field(default=None, repr=False, compare=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    shards: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    index_metadata: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Checkpoint:
    """A file after reading: the object in it, and the places of its state dicts. Attributes as in ``Artifact``."""

    path: Path
    format: Format
    bytes: int
    sha256: str
    value: Any = field(repr=False)
    contents: Contents = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    shards: Mapping[str, str] = field(default_factory=dict, repr=False)
    index_metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)


def read_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint without running code from it; an index also reads its shards. Errors call it ``str(source)``.

    Raises:
        ArtifactError: the file is missing, unreadable, damaged or hostile.
        NoWeightsError: the file is sound but holds no weights.
        UnsupportedError: the file is not a checkpoint.
    """
    path = Path(source)
    try:
        data, kind = _read(path)
        if kind == "index":
            return _read_shards(path, data)
        value, metadata = _open(kind, data)
        contents = contents_of(value)
    except ArtifactError as error:
        raise type(error)(f"Cannot load {source}: {error.message}", error.hint) from None
    return Checkpoint(path, kind, len(data), hashlib.sha256(data).hexdigest(), value, contents, metadata)


def with_values(node: Any, places: Sequence[KeyPath], values: Mapping[str, Any]) -> Any:
    """A copy of a checkpoint with ``values`` in the dicts at ``places``; it shares everything outside these paths."""
    here = () in places
    below: dict[Any, list[KeyPath]] = {}
    for place in places:
        if place:
            below.setdefault(place[0], []).append(place[1:])
    if isinstance(node, list | tuple):
        parts = [with_values(part, below[key], values) if key in below else part for key, part in enumerate(node)]
        return type(node)(parts)
    copy = type(node)()
    for key, part in node.items():
        if here and key in values:
            copy[key] = values[key]
        else:
            copy[key] = with_values(part, below[key], values) if key in below else part
    if hasattr(node, "_metadata"):
        copy._metadata = node._metadata  # where nn.Module.state_dict puts versions
    return copy


def _read(path: Path) -> tuple[bytes, Any]:
    with opened(path) as found:  # refuses other files before all of the file is in memory
        plain = found.format == "torch-legacy" and not torch_file.is_legacy(found.head)
        limit = MAX_INDEX_BYTES if found.format == "index" else MAX_PICKLE_BYTES if plain else MAX_FILE_BYTES
        return found.file.read(limit), found.format


def _open(kind: Format, data: bytes) -> tuple[Any, Mapping[str, str]]:
    if kind == "safetensors":
        return safetensors_file.read_safetensors(data)
    check: Callable[[bytes], None] = torch_file.check_zip if kind == "torch-zip" else torch_file.check_legacy
    try:
        check(data)
    except UnsupportedError:
        raise
    except ArtifactError:
        arguments = torch_file.arguments_in(data)
        if arguments:
            raise NoWeightsError(f"it has no weights of a network, only {arguments}.", GIVE_CHECKPOINT) from None
        raise
    return torch_file.load_checked(data), {}


def _read_shards(path: Path, index: bytes) -> Checkpoint:
    names = shard_names(index)
    state: dict[str, Tensor] = {}
    digest, total, formats = hashlib.sha256(hashlib.sha256(index).digest()), len(index), set()
    metadata: Mapping[str, str] = {}
    for shard in dict.fromkeys(names.values()):
        data, kind = _shard(path.parent / shard)
        total += len(data)
        if total > MAX_FILE_BYTES:
            raise UnsupportedError(f"its shards have more than {MAX_FILE_BYTES} bytes.", GIVE_CHECKPOINT)
        part, metadata = _open(kind, data)
        check_shard(shard, part, {name for name, home in names.items() if home == shard})
        state |= part
        formats.add(kind)
        digest.update(hashlib.sha256(data).digest())
    if len(formats) > 1:
        raise ArtifactError(f"its shards are of different formats: {', '.join(sorted(formats))}.", GIVE_INDEX)
    ordered = {name: state[name] for name in names}
    found = json.loads(index).get("metadata")
    return Checkpoint(
        path,
        formats.pop(),
        total,
        digest.hexdigest(),
        ordered,
        contents_of(ordered),
        metadata,
        names,
        found if isinstance(found, dict) else {},
    )


def _shard(path: Path) -> tuple[bytes, Format]:
    try:
        data, kind = _read(path)
    except ArtifactError as error:
        raise type(error)(f"its shard {quoted(path.name)} cannot be read: {error.message}", GIVE_INDEX) from None
    if kind == "index":
        raise ArtifactError(f"its shard {quoted(path.name)} is an index itself.", GIVE_INDEX)
    return data, kind


def check_shard(name: str, part: Any, expected: set[str]) -> None:
    """Checks that a shard holds exactly the tensors that the index expects in it.

    Raises:
        ArtifactError: it does not.
    """
    if not isinstance(part, dict) or not all(map(is_tensor, part.values())):
        raise ArtifactError(f"its shard {quoted(name)} is not a map of names to tensors.", GIVE_INDEX)
    odd = sorted(map(str, expected ^ set(part)))
    if odd:
        where = "only the index names" if odd[0] in expected else "the index does not name"
        raise ArtifactError(f"{where} the tensor {quoted(odd[0])} of the shard {quoted(name)}.", GIVE_INDEX)
