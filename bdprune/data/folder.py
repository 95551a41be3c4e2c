"""A folder tree with one sub-folder per class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bdprune.data.decode import MAX_ENCODED_BYTES, decode_image
from bdprune.data.source import MAX_LABEL, as_class_names
from bdprune.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


class FolderSource:
    """Images below ``root/<class>/``, at any depth; hidden files and other file types are passed over.

    Class folders that all have whole numbers as names mean these labels; otherwise label i is the i-th name in
    sorted order, and an empty folder keeps the place of a class without images.

    Raises:
        DataError: a folder can't be read, there are no class folders, or two of them mean the same label.
    """

    def __init__(self, root: Path) -> None:
        self.name = str(root)
        folders = _class_folders(root)
        numbers = _numbers([folder.name for folder in folders])
        self.class_names = () if numbers else as_class_names([folder.name for folder in folders])
        self._files: list[Path] = []
        labels: list[int] = []
        for label, folder in zip(numbers or range(len(folders)), folders, strict=True):
            files = _image_files(folder)
            self._files += files
            labels += [label] * len(files)
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def describe(self, index: int) -> str:
        return str(self._files[index])

    def read(self, index: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for slot, position in enumerate(index):
            path = self._files[position]
            yield slot, decode_image(_read_bytes(path), str(path))


def _class_folders(root: Path) -> list[Path]:
    try:
        entries = sorted(root.iterdir(), key=lambda entry: entry.name)
        folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise _unreadable(root, error) from error
    if not folders:
        found = f"{len(entries)} other entries" if entries else "nothing"
        raise DataError(f"{root} holds {found} but no class folders.", "Put the images into one sub-folder per class.")
    return folders


def _numbers(names: list[str]) -> list[int] | None:
    """The labels that the folder names spell, None when not all of them are whole numbers."""
    if not all(name.isascii() and name.isdecimal() for name in names):
        return None
    too_long = [name for name in names if len(name.lstrip("0")) > len(str(MAX_LABEL))]
    numbers = [] if too_long else [int(name) for name in names]
    if too_long or max(numbers) > MAX_LABEL:
        raise DataError(f"The class folder {max(names, key=len)[:80]} is too large for a label.", "Number from 0.")
    if len(set(numbers)) < len(numbers):
        twice = next(name for name in names if numbers.count(int(name)) > 1)
        raise DataError(f"Two class folders mean label {int(twice)}, one of them {twice}.", "Merge them.")
    return numbers


def _image_files(folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise _unreadable(folder, error) from error

    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        candidates = (Path(parent, name) for name in sorted(names) if not name.startswith("."))
        # is_file leaves out pipes and devices, which would block or never end.
        files += [path for path in candidates if path.suffix.lower() in SUFFIXES and path.is_file()]
    return files


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_ENCODED_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    reason = error.strerror or type(error).__name__
    return DataError(f"{path} cannot be read: {reason}.", "Check the path and its permissions.")
