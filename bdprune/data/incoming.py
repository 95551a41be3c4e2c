"""Images without labels, such as incoming queries or a training set: read part by part, so that any number fits."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from bdprune.data import tree
from bdprune.data.clean import CleanData
from bdprune.data.dataset import SizedDataset, as_image
from bdprune.data.decode import MAX_ENCODED_BYTES, decode_image
from bdprune.data.formats import READ
from bdprune.data.load import magic_of, resize, resize_note, unit, wrong_channels
from bdprune.data.npz import NpzSource
from bdprune.data.parquet import ParquetSource
from bdprune.data.source import MAX_IMAGES, ImageSource, as_pixels
from bdprune.errors import DataError, first_line

IncomingSource: TypeAlias = CleanData | Tensor | SizedDataset | str | os.PathLike[str]
"""A folder of pictures, an ``.npz`` or parquet file, images ``[N, C, H, W]``, or a dataset; labels are not read."""

_KINDS = "Give a folder of pictures, an .npz archive, a parquet file, images [N, C, H, W] or a torch Dataset."


class Incoming:
    """Images to inspect, in the shape of a model.

    Images of another size are resized (bilinear, antialiased), and grey images become RGB for a model that takes RGB.

    Args:
        source: where the images come from.
        input_shape: the model's (C, H, W).

    Attributes:
        name: of the source in reports.
        unread: position -> why an image cannot be used; complete after :meth:`parts`.
        passed_over: number of skipped files of a folder, by suffix or reason.

    Raises:
        DataError: the source cannot be read or holds no image.
    """

    def __init__(self, source: IncomingSource, input_shape: tuple[int, int, int]) -> None:
        self._source = _open(source, input_shape)
        self._shape = input_shape
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._grey = 0
        self._converted: Counter[str] = Counter()
        self._state = hashlib.sha256(repr(input_shape).encode())
        self.name = self._source.name
        self.unread: dict[int, str] = {}
        if not len(self):
            raise DataError(f"{self.name} holds 0 images.", _KINDS)

    def __len__(self) -> int:
        return len(self._source.labels)

    @property
    def passed_over(self) -> Mapping[str, int]:
        return self._source.passed_over

    def describe(self, index: int) -> str:
        """The name of image ``index``: its path, or its place in a file."""
        return self._source.describe(index)

    def parts(self, size: int) -> Iterator[tuple[list[int], Tensor]]:
        """All images in order, at most ``size`` at a time, as (positions, ``[n, C, H, W]`` float32 in [0, 1]).

        It leaves out images that cannot be used; ``unread`` says why.

        Raises:
            DataError: no image can be used; it is the error of the first one.
        """
        first: DataError | None = None
        for start in range(0, len(self), size):
            index = range(start, min(start + size, len(self)))
            found, errors = self._read(index)
            first = first or next(iter(errors.values()), None)
            self.unread |= {position: str(error) for position, error in errors.items()}
            if found:
                images = torch.stack(list(found.values()))
                self._state.update(images.numpy().tobytes())
                yield list(found), images
        if first is not None and len(self.unread) == len(self):
            raise first

    @property
    def digest(self) -> str:
        """``sha256:`` and the hex digest of the images that :meth:`parts` has yielded."""
        return f"sha256:{self._state.hexdigest()}"

    @property
    def notes(self) -> tuple[str, ...]:
        """Changes to the images that :meth:`parts` has yielded, a sentence each."""
        notes, size = list(self._source.notes), self._shape[1:]
        others = {found: count for found, count in self._sizes.items() if found != size}
        if others:
            notes.append(resize_note(sum(others.values()), set(others), size))
        if self._grey:
            notes.append(f"{self._grey} grey images were converted to RGB.")
        if self._converted:
            kinds = ", ".join(self._converted)
            notes.append(f"{self._converted.total()} images were converted to grey or RGB from {kinds}.")
        return tuple(notes)

    def _read(self, index: Sequence[int]) -> tuple[dict[int, Tensor], dict[int, DataError]]:
        """The images at ``index`` by position, in order, and the errors of the others.

        Each image gets its final size as soon as it is decoded, so that only one is in memory at its own size.
        """
        found: dict[int, Tensor] = {}
        errors: dict[int, DataError] = {}
        error = self._take(index, found, errors)
        if error is not None and len(index) == 1:
            errors[index[0]] = error
        elif error is not None:  # the source stopped at one that it cannot read
            for position in set(index) - found.keys() - errors.keys():
                more, wrong = self._read([position])
                found, errors = found | more, errors | wrong
        return dict(sorted(found.items())), dict(sorted(errors.items()))

    def _take(self, index: Sequence[int], found: dict[int, Tensor], errors: dict[int, DataError]) -> DataError | None:
        """Adds the images that the source reads, and the errors of those of a wrong kind; returns the source's own."""
        before = Counter(self._source.converted)
        try:
            for slot, image in self._source.read(index):
                position = index[slot]
                try:
                    found[position], grey = self._fit(image, position)
                except DataError as error:
                    errors[position] = error
                else:
                    self._grey += grey
                    self._sizes[image.shape[1], image.shape[2]] += 1
                    self._converted += self._source.converted - before
                before = Counter(self._source.converted)
        except DataError as error:
            return error
        return None

    def _fit(self, image: Tensor, position: int) -> tuple[Tensor, bool]:
        """The image in the shape of the model, and whether it was grey and is RGB now."""
        channels, size = self._shape[0], self._shape[1:]
        grey = image.shape[0] == 1 and channels == 3
        if image.shape[0] != channels and not grey:
            raise wrong_channels(self.describe(position), image.shape[0], channels)
        fitted = unit(image) if image.shape[1:] == size else resize(image, size)
        return fitted.expand(channels, *size), grey


class PictureSource(ImageSource):
    """The pictures of a folder, at any depth: a flat folder, or a folder per class.

    Raises:
        DataError: the folder can't be read, or holds no picture.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        walk = tree.image_files(root)
        if not walk.files:
            held = tree.counted(walk.passed_over)
            what = f"holds no picture that can be read, only {held}" if held else "is empty"
            raise DataError(f"{root} {what}.", f"Give a folder of pictures; {READ} are read.")
        self._files = walk.files
        self.labels = torch.zeros(len(walk.files), dtype=torch.int64)
        self.passed_over = dict(walk.passed_over.most_common())
        self.notes = (f"Skipped in the folder: {tree.counted(walk.passed_over)}.",) if walk.passed_over else ()

    def describe(self, index: int) -> str:
        return str(self._files[index])

    def read(self, index: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for slot, position in enumerate(index):
            encoded = tree.read_bytes(self._files[position], MAX_ENCODED_BYTES)
            yield slot, decode_image(encoded, self.describe(position), self.converted)


class StackSource(ImageSource):
    """Images in memory, ``[N, C, H, W]``.

    Raises:
        DataError: they have another shape.
    """

    def __init__(self, images: Tensor, name: str) -> None:
        super().__init__(name)
        if images.ndim != 4 or images.is_meta:
            raise DataError(f"The images of {name} have shape {tuple(images.shape)}.", "Give images [N, C, H, W].")
        self._images = images.detach().cpu()
        self.labels = torch.zeros(len(images), dtype=torch.int64)

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def read(self, index: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for slot, position in enumerate(index):
            image = self._images[position]
            values = (image.float() if image.is_floating_point() else image).numpy()
            yield slot, torch.from_numpy(np.ascontiguousarray(as_pixels(values, self.describe(position))))


class ItemSource(ImageSource):
    """Items of a dataset: images, or tuples that begin with one.

    Raises:
        DataError: the dataset has no length.
    """

    def __init__(self, dataset: SizedDataset) -> None:
        super().__init__(type(dataset).__name__)
        self._dataset = dataset
        try:
            count = len(dataset)
        except TypeError as error:
            raise DataError(f"{self.name} has no length.", "Give a map-style dataset, not an iterable one.") from error
        if count > MAX_IMAGES:
            raise DataError(f"{self.name} has {count} items.", f"At most {MAX_IMAGES} are read; give a Subset.")
        self.labels = torch.zeros(count, dtype=torch.int64)

    def describe(self, index: int) -> str:
        return f"item {index} of {self.name}"

    def read(self, index: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for slot, position in enumerate(index):
            where = self.describe(position)
            try:
                item = self._dataset[position]
            except Exception as error:  # a dataset may raise anything
                raise DataError(f"{where} cannot be read: {type(error).__name__}: {first_line(error)}.") from error
            image = item[0] if isinstance(item, tuple | list) and item else item
            yield slot, as_image(image, where, self.converted)


def _open(source: IncomingSource, input_shape: tuple[int, int, int]) -> ImageSource:
    if isinstance(source, CleanData):
        return StackSource(source.images, source.source)
    if isinstance(source, Tensor):
        return StackSource(source, "memory")
    if isinstance(source, str | os.PathLike):
        return _open_path(Path(source), input_shape)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return ItemSource(source)
    raise DataError(f"A {type(source).__name__} has no items by number, so it cannot be inspected.", _KINDS)


def _open_path(path: Path, input_shape: tuple[int, int, int]) -> ImageSource:
    if path.is_dir():
        return PictureSource(path)
    magic = magic_of(path)
    if magic == b"PAR1":
        return ParquetSource(path, labelled=False)
    if magic == b"PK\x03\x04":
        return NpzSource(path, input_shape, labelled=False)
    raise DataError(f"{path} holds no images in a known format.", _KINDS)
