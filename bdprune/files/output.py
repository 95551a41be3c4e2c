"""Writes files so that a reader sees whole ones, or whole parts of one."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from bdprune.errors import OutputError

TEMPORARY = ".bdprune-"
"""How the names of temporary files begin."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_writable(path: Path) -> None:
    """Checks, before long work, that ``path`` can be written; it leaves no file behind.

    Raises:
        OutputError: it is a folder, its folder does not exist, or it cannot be written.
    """
    try:
        if path.is_dir():
            raise OutputError(f"{path} is a folder, not a file.", "Give the name of a file.")
        if is_special(path):
            return
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def make_folder(path: Path) -> None:
    """Creates the folder ``path`` if it does not exist.

    Raises:
        OutputError: it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` so that a reader never sees a partial file.

    Raises:
        OutputError: it cannot be written.
    """
    write_atomically(path, text.encode())


def drop_half_line(path: Path) -> None:
    """Removes the half line that a killed run may have left at the end of a file of lines."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


class GrowingFile:
    """A text file that is written in parts; a reader sees each part when it is complete.

    Args:
        path: the file; the first part replaces what it holds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def write(self, text: str) -> None:
        """Adds a part.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            if self._file is None:
                self._file = self._path.open("w", encoding="utf-8", newline="")
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def close(self) -> None:
        """Closes the file; without any part it is empty.

        Raises:
            OutputError: it cannot be written.
        """
        self.write("")
        assert self._file is not None
        self._file.close()


def write_atomically(path: Path, data: bytes) -> None:
    """Writes ``data`` to a temporary file next to ``path`` and moves it there; to a pipe or a device, directly.

    Raises:
        OutputError: this fails; it leaves no file behind.
    """
    if is_special(path):
        try:
            path.write_bytes(data)
        except OSError as error:
            raise _unwritable(path, error) from error
        return
    with replaced(path) as file:
        file.write(data)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A temporary file next to ``path``, which takes its place at the end, unless an error ends the work before.

    Raises:
        OutputError: this fails; it leaves no file behind.
    """
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        # Not with tempfile: its files are private, and reading the umask changes it for other threads.
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        hint = "Free some space, and run the same command again." if error.errno in _FULL else "Give another path."
        raise OutputError(f"Cannot write {path}: {error.strerror or error}.", hint) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def is_special(path: Path) -> bool:
    """Whether ``path`` is a pipe or device (``/dev/null``), which is written to and not replaced."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _unwritable(path: Path, error: OSError) -> OutputError:
    hint = "Give a path that can be written."
    return OutputError(f"{str(path)[:200]} cannot be written: {error.strerror or error}.", hint)
