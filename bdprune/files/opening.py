"""Opens a file as a checkpoint: its size, and its format by the first bytes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from bdprune.errors import ArtifactError, UnsupportedError
from bdprune.files import kinds as file_kinds
from bdprune.files.kinds import HEAD_BYTES, kind_of_bytes

Format = Literal["torch-zip", "torch-legacy", "safetensors"]

MAX_FILE_BYTES = 8 << 30
GIVE_CHECKPOINT = "Give a checkpoint saved with torch.save or as safetensors."
_CHECK_PATH = "Check the path and its permissions."
_FORMATS: dict[file_kinds.FileKind, Format | Literal["index"]] = {
    file_kinds.TORCH_ZIP: "torch-zip",
    file_kinds.SAFETENSORS: "safetensors",
    file_kinds.INDEX: "index",
    file_kinds.PICKLE: "torch-legacy",
    file_kinds.EMPTY: "torch-legacy",
    file_kinds.UNKNOWN: "torch-legacy",
    file_kinds.TEXT: "torch-legacy",
}


@dataclass(frozen=True)
class OpenFile:
    """A file that is open, at its first byte.

    Attributes:
        file: the file.
        size: its number of bytes.
        format: of its content, or ``index`` for the index of shards.
        head: its first bytes.
    """

    file: BinaryIO
    size: int
    format: Format | Literal["index"]
    head: bytes


@contextmanager
def opened(path: Path) -> Iterator[OpenFile]:
    """The file at ``path``.

    Raises:
        ArtifactError: it is missing, empty or cannot be read.
        UnsupportedError: it is not a regular file, too large, or of a kind that is not a checkpoint.
    """
    try:
        status = _status(path)
        if stat.S_ISDIR(status.st_mode):
            raise UnsupportedError("it is a folder.", GIVE_CHECKPOINT)
        if not stat.S_ISREG(status.st_mode):
            raise UnsupportedError("it is not a regular file.", GIVE_CHECKPOINT)
        if status.st_size > MAX_FILE_BYTES:
            raise UnsupportedError(f"it has {status.st_size} bytes, more than any image classifier.", GIVE_CHECKPOINT)
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            format = _format(head)
            if not head:
                raise ArtifactError("the file is empty.", "Download it again.")
            file.seek(0)
            yield OpenFile(file, status.st_size, format, head)
    except OSError as error:
        raise ArtifactError(f"{error.strerror or error}.", _CHECK_PATH) from None


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except ValueError as error:  # a path with a null byte
        raise ArtifactError(f"{error}.", _CHECK_PATH) from None


def _format(head: bytes) -> Format | Literal["index"]:
    """The format by the first bytes; the suffix does not matter."""
    kind = kind_of_bytes(head)
    if kind in _FORMATS:
        return _FORMATS[kind]
    if kind == file_kinds.TAR:
        hint = "Load it with an old torch in a place you trust and save its state dict again."
        raise UnsupportedError("it is a tar archive (torch before 0.1.10 wrote those).", hint)
    raise UnsupportedError(f"it is {kind.name}.", GIVE_CHECKPOINT)
