"""Attachments of a report: tensors and pictures in a folder, named by their digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from bdprune.errors import DataError, OutputError
from bdprune.files import check_writable, make_folder, write_atomically
from bdprune.record import Attachment, Evidence, Result

_SUFFIXES = {"application/safetensors": ".safetensors", "image/png": ".png"}


def attachments_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder, created and checked before any work.

    Raises:
        OutputError: files cannot be written there.
    """
    return output_folder(folder, "attachments")


def output_folder(folder: str | os.PathLike[str], what: str) -> Path:
    """The folder for ``what``, created and checked before any work.

    Raises:
        OutputError: files cannot be written there.
    """
    if not os.fspath(folder):
        raise OutputError(f"The name of the folder for {what} is empty.", "Give a name, or drop the option.")
    make_folder(Path(folder))
    check_writable(Path(folder) / "file")
    return Path(folder)


def read_attachment(one: Attachment, folders: Sequence[Path]) -> bytes | None:
    """The bytes of an attachment from the first folder that has its file; None if no folder has it.

    Raises:
        DataError: the file's content has changed.
    """
    paths = [folder / Path(one.file).name for folder in folders if one.file]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    if path.stat().st_size != one.bytes or hashlib.sha256(content := path.read_bytes()).hexdigest() != one.sha256:
        raise DataError(f"{path} has changed since the scan wrote it.", "Scan again with --attachments.")
    return content


def save_attachments(
    attachments: Iterable[Attachment], contents: Mapping[str, bytes], folder: Path | None
) -> tuple[Attachment, ...]:
    """Writes ``attachments`` to ``folder``, and returns their records with the names of the files.

    Args:
        contents: bytes by their SHA-256.
        folder: where to write them; None writes nothing.

    Raises:
        OutputError: they cannot be written.
    """
    if folder is None:
        return tuple(attachments)
    return tuple(_saved(one, contents[one.sha256], folder) for one in attachments)


def with_saved_attachments(result: Result, contents: Mapping[str, bytes], folder: Path) -> Result:
    """Writes the attachments of a scan to ``folder``, and returns the result with the names of the files."""
    detectors = tuple(_with_files(one, save_attachments(one.attachments, contents, folder)) for one in result.detectors)
    return msgspec.structs.replace(result, detectors=detectors)


def _with_files(evidence: Evidence, saved: tuple[Attachment, ...]) -> Evidence:
    """The evidence with its saved attachments, and its triggers with the names of their files."""
    files = {one.name: one.file for one in saved}
    triggers = tuple(
        msgspec.structs.replace(one, file=files.get(one.attachment, one.file)) for one in evidence.triggers
    )
    return msgspec.structs.replace(evidence, attachments=saved, triggers=triggers)


def _saved(one: Attachment, content: bytes, folder: Path) -> Attachment:
    file = f"{one.name}-{one.sha256[:16]}{_SUFFIXES.get(one.media_type, '.bin')}"
    write_atomically(folder / file, content)
    return msgspec.structs.replace(one, file=file)
