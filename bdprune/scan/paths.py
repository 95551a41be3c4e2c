"""From what was typed to the files that will be scanned."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from bdprune.errors import OptionError

SUFFIXES = (".pt", ".pth", ".th", ".tar", ".ckpt", ".bin", ".pkl", ".safetensors")


def expand(paths: Sequence[str | Path]) -> list[Path]:
    """Files, in order and without repeats: a file as named, a folder's checkpoints (recursive, by suffix, sorted), the
    matches of a glob (sorted; a folder among them stands for its checkpoints).

    Raises:
        OptionError: something was named that does not exist, or a folder that cannot be read.
    """
    files = [file for path in paths for file in _files(str(path))]
    return list(dict.fromkeys(files))


def check_exists(path: str | Path) -> None:
    """Makes sure that there is something at ``path``.

    Raises:
        OptionError: there is nothing, or nothing that may be looked at.
    """
    try:
        os.stat(path)
    except OSError as error:
        raise _lost(path, error) from error


def _files(path: str) -> list[Path]:
    if glob.has_magic(path) and not os.path.exists(path):
        return [file for match in sorted(glob.glob(path, recursive=True)) for file in _checkpoints(Path(match))]
    check_exists(path)
    return _checkpoints(Path(path))


def _checkpoints(path: Path) -> list[Path]:
    """``path`` itself, or the checkpoints below the folder that it is.

    Links that lead nowhere count: what was to be scanned and is not there must not go unnoticed.
    """
    if not path.is_dir():
        return [path]

    def fail(error: OSError) -> None:
        raise _lost(error.filename, error) from error

    below = (Path(parent, name) for parent, _, names in os.walk(path, onerror=fail) for name in names)
    return sorted(file for file in below if file.suffix.lower() in SUFFIXES)


def _lost(path: str | Path, error: OSError) -> OptionError:
    if isinstance(error, FileNotFoundError):
        return OptionError(f"There is no file or folder {str(path)!r}.", "Check the path.")
    return OptionError(f"{str(path)[:200]!r} cannot be read: {error.strerror}.", "Check the path and its permissions.")
