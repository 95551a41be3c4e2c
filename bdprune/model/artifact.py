"""Opens a checkpoint file: says what it is, checks it in full, reads it, and keeps what saving it back needs."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from bdprune.errors import ArtifactError, UnsupportedError
from bdprune.model import safetensors_file, torch_file
from bdprune.model.pickle_walk import MAX_PICKLE_BYTES
from bdprune.model.state import Found, find_state

Format = Literal["torch-zip", "torch-legacy", "safetensors"]

MAX_FILE_BYTES = 8 << 30
_HEAD_BYTES = 512
_GIVE_CHECKPOINT = "Give a checkpoint saved with torch.save or as safetensors."
_FOREIGN = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)"),
    (b"GGUF", "a GGUF file (a language model)"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"PAR1", "a parquet file"),
    (b"%PDF", "a PDF"),
    (b"\x7fELF", "a program"),
    (b"<!DOCTYPE", "an HTML page (a failed download?)"),
    (b"<html", "an HTML page (a failed download?)"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
)


@dataclass(frozen=True)
class Artifact:
    """Where a model came from and how to write it back.

    Attributes:
        path: the file.
        format: ``torch-zip``, ``torch-legacy`` or ``safetensors``.
        bytes: size of the file.
        sha256: digest of the file, hexadecimal.
        state_keys: keys that lead to the state dict inside the checkpoint; none when it is the checkpoint.
        prefix: what stands before every name of the network in the state dict, such as ``module.``.
        dtypes: names in the state dict, in the order of the file, each with its original dtype (None: no tensor).
        kept: entries of the state dict that the float32 network cannot give back: float64 tensors, entries that are
            no part of the network.
        checkpoint: everything else in the checkpoint, with an empty dict in place of the state dict.
        metadata: of the safetensors header, or the attribute of that name that ``nn.Module.state_dict`` sets.
    """

    path: Path
    format: Format
    bytes: int
    sha256: str
    state_keys: tuple[str, ...] = ()
    prefix: str = ""
    dtypes: Mapping[str, torch.dtype | None] = field(default_factory=dict, repr=False, compare=False)
    kept: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    checkpoint: Any = field(default=None, repr=False, compare=False)
    metadata: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def state_key(self) -> str:
        """Key of the state dict inside the checkpoint, nested ones joined by ``/``; ``""`` when it is bare."""
        return "/".join(self.state_keys)


def read_artifact(path: str | Path) -> tuple[Artifact, Found]:
    """Reads a checkpoint without running anything in it.

    Returns:
        the artifact, its ``prefix``, ``dtypes`` and ``kept`` still empty, and the state dict that was found in it.

    Raises:
        ArtifactError: missing, unreadable, damaged or hostile.
        UnsupportedError: no checkpoint.
    """
    path = Path(path)
    try:
        data, kind = _read(path)
        checkpoint, metadata = _open(kind, data)
        found = find_state(checkpoint)
    except ArtifactError as error:
        raise type(error)(f"Cannot load {path}: {error.message}", error.mend) from None
    digest = hashlib.sha256(data).hexdigest()
    if kind != "safetensors":
        metadata = getattr(found.state, "_metadata", None)
    return Artifact(path, kind, len(data), digest, found.keys, checkpoint=checkpoint, metadata=metadata), found


def _read(path: Path) -> tuple[bytes, Format]:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UnsupportedError("it is a folder.", _GIVE_CHECKPOINT)
        if not stat.S_ISREG(status.st_mode):
            raise UnsupportedError("it is no regular file.", _GIVE_CHECKPOINT)
        if status.st_size > MAX_FILE_BYTES:
            raise UnsupportedError(f"it has {status.st_size} bytes, more than any image classifier.", _GIVE_CHECKPOINT)
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            kind = _format(head)  # what is no checkpoint is refused before all of it is in memory
            file.seek(0)
            plain = kind == "torch-legacy" and not torch_file.is_legacy(head)
            data = file.read(MAX_PICKLE_BYTES if plain else MAX_FILE_BYTES)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ArtifactError(f"{reason}.", "Check the path and its permissions.") from None
    if not data:
        raise ArtifactError("the file is empty.", "Fetch it again.")
    return data, kind


def _format(data: bytes) -> Format:
    """The format by the first bytes; the extension says nothing."""
    for magic, name in _FOREIGN:
        if data.startswith(magic):
            raise UnsupportedError(f"it is {name}.", _GIVE_CHECKPOINT)
    if data[257:262] == b"ustar":
        mend = "Load it with an old torch in a place you trust and save its state dict again."
        raise UnsupportedError("it is a tar archive (torch before 0.1.10 wrote those).", mend)
    if data.startswith(b"PK"):
        return "torch-zip"
    if torch_file.is_legacy(data):
        return "torch-legacy"
    if safetensors_file.looks_like_safetensors(data):
        return "safetensors"
    return "torch-legacy"


def _open(kind: Format, data: bytes) -> tuple[Any, Mapping[str, Any] | None]:
    if kind == "safetensors":
        return safetensors_file.read_safetensors(data)
    (torch_file.check_zip if kind == "torch-zip" else torch_file.check_legacy)(data)
    return torch_file.load_checked(data), None
