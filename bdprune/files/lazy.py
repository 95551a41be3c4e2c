"""Opens a checkpoint without torch and without reading its tensors: their names, shapes and places in the file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdprune.errors import ArtifactError, NoWeightsError, UnsupportedError
from bdprune.files import torch_file
from bdprune.files.artifact import check_shard
from bdprune.files.opening import GIVE_CHECKPOINT, MAX_FILE_BYTES, Format, OpenFile, opened
from bdprune.files.pickle_claims import TensorClaim
from bdprune.files.quoting import quoted
from bdprune.files.safetensors_file import stored_safetensors
from bdprune.files.shards import GIVE_INDEX, MAX_INDEX_BYTES, shard_names
from bdprune.files.state import Contents, check_expansion, contents_of
from bdprune.files.stored import StoredTensor
from bdprune.files.torch_file import Places

_MAX_ARGUMENTS_FILE = 1 << 20


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint whose tensors are still in its files.

    Attributes:
        files: the file, or the index and its shards.
        format: of the file or of the shards.
        bytes: size of all files.
        states: the name of each set of weights (empty if it is the checkpoint itself) -> its tensors, in order.
        outside: names of weights outside of these sets.
    """

    files: tuple[Path, ...]
    format: Format
    bytes: int
    states: Mapping[str, Mapping[str, StoredTensor]]
    outside: tuple[str, ...] = ()

    def sha256(self) -> str:
        """Digest of the file, hexadecimal; for shards, the digest of the digests of the index and of every shard.

        Raises:
            ArtifactError: a file cannot be read any more.
        """
        try:
            digests = [_digest(path) for path in self.files]
        except OSError as error:
            raise ArtifactError(f"it cannot be read: {error.strerror or error}.") from error
        return digests[0].hex() if len(digests) == 1 else hashlib.sha256(b"".join(digests)).hexdigest()


def open_stored(source: str | os.PathLike[str]) -> StoredCheckpoint:
    """Opens a checkpoint of ``torch.save`` or safetensors, or the index of shards. It runs no code from it. Errors
    call it ``str(source)``.

    The checks are those of ``read_checkpoint``, except for the checksums of a zip archive: they would need all bytes.

    Raises:
        ArtifactError: the file is missing, unreadable, damaged or hostile.
        NoWeightsError: the file is sound but holds no weights.
        UnsupportedError: the file is not a checkpoint.
    """
    path = Path(source)
    try:
        with opened(path) as found:
            if found.format == "index":
                return _shards(path, found.file.read(MAX_INDEX_BYTES))
            contents, stored = _contents(path, found)
            return _checkpoint((path,), found.format, found.size, contents, stored)
    except ArtifactError as error:
        raise type(error)(f"Cannot load {source}: {error.message}", error.hint) from None


def _contents(path: Path, found: OpenFile) -> tuple[Any, Places | None]:
    """The object in a file; the places of its storages if its tensors are described by them."""
    if found.format == "safetensors":
        return stored_safetensors(path), None
    read = torch_file.places_in_zip if found.format == "torch-zip" else torch_file.places_in_legacy
    try:
        places = read(found.file, found.size)
    except UnsupportedError:
        raise
    except ArtifactError:
        found.file.seek(0)
        few = found.file.read(_MAX_ARGUMENTS_FILE) if found.size <= _MAX_ARGUMENTS_FILE else b""
        if arguments := torch_file.arguments_in(few):
            raise NoWeightsError(f"it has no weights of a network, only {arguments}.", GIVE_CHECKPOINT) from None
        raise
    return places.walked.value, places


def _checkpoint(
    files: tuple[Path, ...], format: Format, size: int, value: Any, places: Places | None
) -> StoredCheckpoint:
    contents: Contents = contents_of(value)
    states: dict[str, dict[str, StoredTensor]] = {}
    for state in contents.states:
        tensors: Mapping[str, Any] = state.tensors()
        check_expansion(tensors, size)
        states[state.name] = _stored(files[0], tensors, places)
    return StoredCheckpoint(files, format, size, states, contents.outside)


def _stored(path: Path, tensors: Mapping[str, Any], places: Places | None) -> dict[str, StoredTensor]:
    """The tensors by name; descriptions of tensors get their places in the file."""
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, TensorClaim):
            assert places is not None
            start = places.starts[tensor.storage.key] + tensor.offset * tensor.storage.item_bytes
            tensor = StoredTensor(path, tensor.dtype, tensor.size, start, tensor.stride, places.swapped)
        found[str(name)] = tensor
    return found


def _shards(path: Path, index: bytes) -> StoredCheckpoint:
    names = shard_names(index)
    files = [path.parent / shard for shard in dict.fromkeys(names.values())]
    state: dict[str, StoredTensor] = {}
    total, formats = len(index), set()
    for file in files:
        part, size, format = _shard(file, {name for name, home in names.items() if home == file.name})
        state |= part
        total += size
        formats.add(format)
        if total > MAX_FILE_BYTES:
            raise UnsupportedError(f"its shards have more than {MAX_FILE_BYTES} bytes.", GIVE_CHECKPOINT)
    if len(formats) > 1:
        raise ArtifactError(f"its shards are of different formats: {', '.join(sorted(formats))}.", GIVE_INDEX)
    ordered = {name: state[name] for name in names}
    return _checkpoint((path, *files), formats.pop(), total, ordered, None)


def _shard(path: Path, expected: set[str]) -> tuple[dict[str, StoredTensor], int, Format]:
    try:
        with opened(path) as found:
            if found.format == "index":
                raise ArtifactError("it is an index itself.", GIVE_INDEX)
            value, places = _contents(path, found)
    except ArtifactError as error:
        raise type(error)(f"its shard {quoted(path.name)} cannot be read: {error.message}", GIVE_INDEX) from None
    check_shard(path.name, value, expected)
    return _stored(path, value, places), found.size, found.format


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
