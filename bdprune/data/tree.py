"""Walks through untrusted folders: it follows links, stops at loops, and counts skipped files."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bdprune.data.formats import HEAD_BYTES, SUFFIXES, is_surely_image
from bdprune.data.source import MAX_IMAGES
from bdprune.errors import DataError

LEFTOVER_FOLDERS = frozenset(
    {
        *("__macosx", "@eadir", "__pycache__", "lost+found", "$recycle.bin", "system volume information"),
        *("#recycle", "#snapshot", "@tmp", "recycler"),
    }
)
LEFTOVER_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store", "icon\r", "sync.ffs_db"})

HIDDEN, LEFTOVER, BROKEN, LOOP = "hidden", "leftover", "broken link", "link to a folder read before"
NOT_A_FILE, NO_SUFFIX = "not a file", "(no suffix)"
UNIMPORTANT = frozenset({HIDDEN, LEFTOVER})
"""Reasons for skipping an entry that is certainly not an image."""

_MAX_SUFFIX = 16


@dataclass
class Walk:
    """The entries below one folder.

    Attributes:
        files: image files, a folder's own before its sub-folders', each sorted by name.
        passed_over: number of other entries, by suffix or reason.
        loops: links to folders that were read before; they were not followed.
    """

    files: list[Path] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    loops: list[Path] = field(default_factory=list)


def image_files(folder: Path, above: Iterable[tuple[int, int]] = ()) -> Walk:
    """The image files below ``folder``, recognised by suffix or by their first bytes; it follows links.

    Args:
        above: (device, inode) of folders that it must not enter.

    Raises:
        DataError: a folder cannot be read, or there are more than ``MAX_IMAGES`` entries.
    """
    walk, visited, waiting, count = Walk(), set(above), [folder], 0
    while waiting:
        parent = waiting.pop()
        known = identity(parent)
        if known in visited:
            walk.loops.append(parent)
            walk.passed_over[LOOP] += 1
            continue
        visited.add(known)
        entries = list_folder(parent)
        count += len(entries)
        if count > MAX_IMAGES:
            raise DataError(f"{folder} holds more than {MAX_IMAGES} files.", "Give a folder with fewer images.")
        waiting += reversed([entry for entry in entries if _sort_out(entry, walk)])
    return walk


def list_folder(folder: Path) -> list[Path]:
    """The entries of a folder, sorted by name.

    Raises:
        DataError: it cannot be read, or has more than ``MAX_IMAGES`` entries.
    """
    names: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                names.append(entry.name)
                if len(names) > MAX_IMAGES:
                    raise DataError(f"{folder} holds more than {MAX_IMAGES} entries.", "Give a smaller folder.")
    except OSError as error:
        raise unreadable(folder, error) from error
    return [folder / name for name in sorted(names)]


def identity(folder: Path) -> tuple[int, int]:
    """Device and inode of a folder, the same for all links to it.

    Raises:
        DataError: it cannot be read.
    """
    try:
        found = folder.stat()
    except OSError as error:
        raise unreadable(folder, error) from error
    return found.st_dev, found.st_ino


def reason_against(path: Path) -> str | None:
    """Why an entry is skipped because of its name; None if it is not."""
    name = path.name.lower()
    if name in LEFTOVER_FILES | LEFTOVER_FOLDERS or name.startswith("._"):
        return LEFTOVER
    return HIDDEN if name.startswith(".") else None


def is_image_file(path: Path) -> bool:
    """Whether :func:`image_files` takes a file of this name for an image, or the file that has it now."""
    return path.suffix.lower() in SUFFIXES or is_surely_image(_head(path))


def suffix_of(path: Path) -> str:
    """The suffix of a file in the counts, safe to print."""
    suffix = "".join(c for c in path.suffix.lower() if c.isprintable())
    return suffix[:_MAX_SUFFIX] or NO_SUFFIX


def counted(passed_over: Counter[str]) -> str:
    """The counts as a text, the largest first: ``3 .txt, 1 hidden``."""
    most = [f"{count} {what}" for what, count in passed_over.most_common(8)]
    rest = sum(passed_over.values()) - sum(count for _, count in passed_over.most_common(8))
    return ", ".join([*most, f"{rest} others"] if rest else most)


def plural(count: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a file; of a longer one, the first ``most`` and one more.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(most + 1)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file or folder that cannot be read."""
    reason = error.strerror or type(error).__name__
    return DataError(f"{path} cannot be read: {reason}.", "Check the path and its permissions.")


def _sort_out(path: Path, walk: Walk) -> bool:
    """True for a folder to enter; other entries are recorded in ``walk``."""
    reason = reason_against(path)
    try:
        mode = 0 if reason else path.stat().st_mode
    except OSError:  # a broken link, or a link to itself
        mode, reason = 0, BROKEN
    if stat.S_ISDIR(mode):
        return True
    # Pipes and devices would block or never end.
    if reason is None and not stat.S_ISREG(mode):
        reason = NOT_A_FILE
    if reason is None and is_image_file(path):
        walk.files.append(path)
    else:
        walk.passed_over[reason or suffix_of(path)] += 1
    return False


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""  # an unreadable file without a known suffix: it is counted
