"""A folder tree with one sub-folder per class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bdprune.data import tree
from bdprune.data.decode import MAX_ENCODED_BYTES, decode_image
from bdprune.data.formats import READ
from bdprune.data.source import MAX_LABEL, ImageSource, as_class_names
from bdprune.errors import DataError, OptionError


class FolderSource(ImageSource):
    """Images below ``root/<class>/``, at any depth, through links to files and folders.

    Images are recognised by suffix or by their first bytes. Other files, hidden files and system files
    (``__MACOSX``, ``Thumbs.db``) are skipped and counted. If all class folders have whole numbers as names, these are
    the labels. Otherwise label i is the i-th name in sorted order; an empty folder stands for a class without images.

    Raises:
        DataError: a folder can't be read, there are no class folders, two folders have the same label, or one holds
            files but no image.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        passed_over: Counter[str] = Counter()
        above = _above(root)
        loops: list[Path] = []
        folders = _class_folders(root, above, passed_over, loops)
        numbers = _numbers([folder.name for folder in folders])
        self.class_names = () if numbers else as_class_names([folder.name for folder in folders])
        self._files: list[Path] = []
        labels: list[int] = []
        for label, folder in zip(numbers or range(len(folders)), folders, strict=True):
            walk = tree.image_files(folder, above)
            _check_class(folder, walk)
            passed_over += walk.passed_over
            loops += walk.loops
            self._files += walk.files
            labels += [label] * len(walk.files)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.passed_over = dict(passed_over.most_common())
        self.notes = _notes(root, passed_over, loops)

    def describe(self, index: int) -> str:
        return str(self._files[index])

    def read(self, index: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for slot, position in enumerate(index):
            path = self._files[position]
            yield slot, decode_image(tree.read_bytes(path, MAX_ENCODED_BYTES), str(path), self.converted)


def _above(root: Path) -> set[tuple[int, int]]:
    """The root and all folders above it: a link back to one of them would lead to the other classes."""
    try:
        resolved = root.resolve()
        return {tree.identity(folder) for folder in (resolved, *resolved.parents)}
    except (OSError, RuntimeError) as error:
        raise tree.unreadable(root, error if isinstance(error, OSError) else OSError(str(error))) from error


def _class_folders(root: Path, above: set[tuple[int, int]], passed_over: Counter[str], loops: list[Path]) -> list[Path]:
    entries = tree.list_folder(root)
    folders: list[Path] = []
    for entry in entries:
        reason = tree.reason_against(entry) or _no_class(entry, above)
        if reason:
            passed_over[reason] += 1
            loops += [entry] if reason == tree.LOOP else []
        else:
            folders.append(entry)
    if not folders:
        count = "1 other entry" if len(entries) == 1 else f"{len(entries)} other entries"
        what = f"has no class folders, only {count}" if entries else "is empty"
        raise DataError(f"{root} {what}.", "Put the images into one sub-folder per class.")
    return folders


def _no_class(entry: Path, above: set[tuple[int, int]]) -> str | None:
    try:
        if not entry.is_dir():
            return tree.suffix_of(entry) if entry.exists() else tree.BROKEN
        return tree.LOOP if tree.identity(entry) in above else None
    except OSError as error:
        raise tree.unreadable(entry, error) from error


def _check_class(folder: Path, walk: tree.Walk) -> None:
    """Refuses a class folder with files but no image; an empty folder is a class without images on purpose."""
    other = Counter({what: count for what, count in walk.passed_over.items() if what not in tree.UNIMPORTANT})
    if walk.files or not other:
        return
    held = tree.plural(sum(other.values()), "file")
    raise DataError(
        f"The class folder {folder} holds {held} but no image that can be read: {tree.counted(other)}.",
        f"Convert its images to PNG, repair its links, or move the folder away if it is not a class; {READ} are read.",
    )


def _notes(root: Path, passed_over: Counter[str], loops: list[Path]) -> tuple[str, ...]:
    notes = []
    if passed_over:
        notes.append(f"Skipped in the folder: {tree.counted(passed_over)}.")
    if loops:
        first = as_class_names([loops[0].relative_to(root)])[0]
        links = f"{first} and {tree.plural(len(loops) - 1, 'other link')} lead" if loops[1:] else f"{first} leads"
        notes.append(f"The link {links} back to a folder that was read before; it was not followed.")
    return tuple(notes)


def _numbers(names: list[str]) -> list[int] | None:
    """The folder names as labels; None if not all of them are whole numbers."""
    if not all(name.isascii() and name.isdecimal() for name in names):
        return None
    too_long = [name for name in names if len(name.lstrip("0")) > len(str(MAX_LABEL))]
    numbers = [] if too_long else [int(name) for name in names]
    if too_long or max(numbers) > MAX_LABEL:
        raise DataError(f"The class folder {max(names, key=len)[:80]} is too large for a label.", "Number from 0.")
    if len(set(numbers)) < len(numbers):
        twice = next(name for name in names if numbers.count(int(name)) > 1)
        raise DataError(f"Two class folders have label {int(twice)}, one of them is {twice}.", "Merge them.")
    return numbers


def check_apart(data: object, written: Iterable[str | os.PathLike[str]]) -> None:
    """Checks that nothing is written into the folder of the clean data: it would change with each result.

    Raises:
        OptionError: something is.
    """
    if not isinstance(data, str | os.PathLike) or not os.path.isdir(data):
        return
    folder = Path(os.path.realpath(data))
    for one in written:
        place = Path(os.path.realpath(one))
        if folder in (place, *place.parents):
            raise OptionError(f"{one} is in the folder {data} of the clean data.", "Choose another place for it.")
