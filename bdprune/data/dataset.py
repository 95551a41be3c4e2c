"""Torch datasets, and other objects with a length and (image, label) items."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from bdprune.data.decode import image_pixels
from bdprune.data.source import MAX_IMAGES, ImageSource, as_class_names, as_labels, as_pixels
from bdprune.errors import DataError, first_line


class SizedDataset(Protocol):
    """The needed part of ``torch.utils.data.Dataset``: a length, and items by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class DatasetSource(ImageSource):
    """Items ``(image, label)``: image a tensor ``[C, H, W]``, an array ``[H, W, C]`` or ``[H, W]``, or a Pillow image.

    Pixels are uint8, or floats in [0, 1], without a normalising transform. Labels come from ``targets`` or ``labels``
    if the dataset has them and has no ``target_transform``, else from one pass over all items. The label of each used
    item must agree with them.

    Raises:
        DataError: the dataset has no length, items of another kind, or labels that are not class numbers.
    """

    def __init__(self, dataset: SizedDataset) -> None:
        super().__init__(type(dataset).__name__)
        self._dataset = dataset
        self.class_names = as_class_names(getattr(dataset, "classes", ()) or ())
        self._count = self._length()
        labels = _known_labels(dataset)
        if labels is None or len(labels) != self._count:
            labels = np.array([self._label(position) for position in range(self._count)], dtype=np.int64)
        self.labels = as_labels(labels, self.name)

    def describe(self, index: int) -> str:
        return f"item {index} of {self.name}"

    def read(self, index: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for slot, position in enumerate(index):
            image, label = self._item(position)
            if _as_int(label) != int(self.labels[position]):
                raise DataError(
                    f"{self.describe(position)} has label {str(label)[:40]}, "
                    f"but the dataset's targets say {int(self.labels[position])}.",
                    "Make the targets of the dataset agree with its items.",
                )
            yield slot, as_image(image, self.describe(position), self.converted)

    def _length(self) -> int:
        try:
            count = len(self._dataset)
        except TypeError as error:
            raise DataError(f"{self.name} has no length.", "Give a map-style dataset, not an iterable one.") from error
        if count > MAX_IMAGES:
            raise DataError(f"{self.name} has {count} items.", f"At most {MAX_IMAGES} are read; give a Subset.")
        return count

    def _item(self, position: int) -> tuple[Any, Any]:
        try:
            item = self._dataset[position]
        except Exception as error:
            raise DataError(
                f"{self.describe(position)} cannot be read: {type(error).__name__}: {first_line(error)}."
            ) from error
        if not isinstance(item, tuple | list) or len(item) != 2:
            kind = type(item).__name__
            raise DataError(f"{self.describe(position)} is a {kind}, not a pair.", "Give items (image, label).")
        return item[0], item[1]

    def _label(self, position: int) -> int:
        label = self._item(position)[1]
        number = _as_int(label)
        if number is None or not -(2**63) <= number < 2**63:
            raise DataError(
                f"{self.describe(position)} has label {str(label)[:40]} of type {type(label).__name__}.",
                "Give class numbers from 0.",
            )
        return number


def _as_int(label: Any) -> int | None:
    """``label`` as an int (from int, NumPy integer or integer tensor of one element), else None."""
    if isinstance(label, Tensor | np.ndarray):
        array = np.asarray(label)
        return int(array.item()) if array.size == 1 and np.issubdtype(array.dtype, np.integer) else None
    if isinstance(label, int | np.integer) and not isinstance(label, bool):
        return int(label)
    return None


def _known_labels(dataset: Any) -> np.ndarray[Any, Any] | None:
    """All labels without decoding an image; None if the dataset has no list of them."""
    if isinstance(dataset, Subset):
        inner = _known_labels(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, TensorDataset):
        return np.asarray(dataset.tensors[-1])
    if getattr(dataset, "target_transform", None) is not None:
        return None
    for name in ("targets", "labels"):
        values = getattr(dataset, name, None)
        if isinstance(values, list | tuple | Tensor | np.ndarray):
            array = np.asarray(values)
            return array if array.ndim == 1 and np.issubdtype(array.dtype, np.integer) else None
    return None


def as_image(image: Any, where: str, converted: Counter[str]) -> Tensor:
    """The pixels ``[C, H, W]`` of a tensor, an array or a Pillow image.

    Raises:
        DataError: it is none of them, or its values are no pixels.
    """
    if isinstance(image, Tensor):
        array = image.detach().cpu().float().numpy() if image.dtype == torch.bfloat16 else image.detach().cpu().numpy()
        return _from_array(array if array.ndim == 3 else array[None], where)
    if isinstance(image, np.ndarray):
        return _from_array(image.transpose(2, 0, 1) if image.ndim == 3 else image[None], where)
    # If Pillow was never imported, no item can be a Pillow image.
    pillow = sys.modules.get("PIL.Image")
    if pillow is not None and isinstance(image, pillow.Image):
        return image_pixels(image, where, converted)
    hint = "Give a tensor, a NumPy array or a Pillow image."
    raise DataError(f"{where} has an image of type {type(image).__name__}.", hint)


def _from_array(array: np.ndarray[Any, Any], where: str) -> Tensor:
    if array.ndim != 3:
        hint = "Give [C, H, W] tensors or [H, W, C] arrays."
        raise DataError(f"{where} has an image of {array.ndim - 1} axes.", hint)
    return torch.from_numpy(np.ascontiguousarray(as_pixels(array, where)))
