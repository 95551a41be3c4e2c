"""From what was typed to the files that will be scanned."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from bdprune.errors import OptionError

SUFFIXES = (".pt", ".pth", ".th", ".tar", ".ckpt", ".bin", ".pkl", ".safetensors")


def expand(paths: Sequence[str | Path]) -> list[Path]:
    """Files, in order and without repeats: a file as named, a folder's checkpoints (recursive, by suffix, sorted), the
    matches of a glob (sorted; a folder among them stands for its checkpoints).

    Raises:
        OptionError: something was named that does not exist.
    """
    files = [file for path in paths for file in _files(str(path))]
    return list(dict.fromkeys(files))


def _files(path: str) -> list[Path]:
    named = Path(path)
    if named.is_dir():
        return sorted(file for file in named.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if named.exists():
        return [named]
    if not glob.has_magic(path):
        raise OptionError(f"There is no file or folder {path!r}.", "Check the path.")
    return [file for match in sorted(glob.glob(path, recursive=True)) for file in _files(match)]
