"""Writes files atomically."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from bdprune.errors import OutputError


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
    if not is_special(path):
        write_atomically(path, text.encode())
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Writes ``data`` to a temporary file next to ``path`` and moves it there.

    Raises:
        OutputError: this fails; it leaves no file behind.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".bdprune-", delete=False) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror or error}.", "Choose a path you can write.") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def is_special(path: Path) -> bool:
    """Whether ``path`` is a pipe or device (``/dev/null``), which is written to and not replaced."""
    return os.path.exists(path) and not os.path.isfile(path)


def _unwritable(path: Path, error: OSError) -> OutputError:
    hint = "Give a path that can be written."
    return OutputError(f"{str(path)[:200]} cannot be written: {error.strerror or error}.", hint)
