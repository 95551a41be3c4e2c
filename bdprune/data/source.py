"""The interface of clean data: all labels at once, and images on request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdprune.errors import DataError

MAX_IMAGES = 10_000_000
MAX_LABEL = 1_000_000
MAX_BYTES = 4 << 30


class ImageSource(ABC):
    """Labelled images that are decoded one by one, so that sampling comes before decoding.

    Attributes:
        name: name of the data in reports.
        labels: ``[N]`` int64, not negative.
        class_names: name of each label, empty if unknown.
        passed_over: number of skipped files of a folder, by suffix or reason.
        converted: number of read images that are neither grey nor RGB in the source, by their kind.
        notes: facts about the source for the report, one sentence each.
    """

    labels: Tensor
    class_names: tuple[str, ...] = ()
    passed_over: Mapping[str, int] = MappingProxyType({})
    notes: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self.name = name
        self.converted: Counter[str] = Counter()

    @abstractmethod
    def describe(self, index: int) -> str:
        """The name of image ``index`` in errors."""

    @abstractmethod
    def read(self, index: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Images at ``index``, in any order, as (position in ``index``, ``[C, H, W]``).

        Pixels are uint8, or float32 in [0, 1].
        """


def reason_of(error: OSError | ValueError) -> str:
    """The system's reason why a path could not be read."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def as_labels(values: np.ndarray[Any, Any], where: str) -> Tensor:
    """Checked class labels: int64 ``[N]`` from any integer array ``[N]`` or ``[N, 1]``.

    Raises:
        DataError: the labels are not integers, have another shape, or are negative or extremely large.
    """
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        hint = "Give class numbers from 0; turn one-hot rows into numbers with argmax(axis=1)."
        raise DataError(f"The labels of {where} have shape {tuple(values.shape)}, not one label an image.", hint)
    if not np.issubdtype(values.dtype, np.integer):
        raise DataError(f"The labels of {where} are {values.dtype}, not integers.", "Give class numbers from 0.")
    if values.size and (values.min() < 0 or values.max() > MAX_LABEL):
        wrong = values.min() if values.min() < 0 else values.max()
        raise DataError(f"The labels of {where} hold {wrong}.", f"Give class numbers from 0 to {MAX_LABEL} at most.")
    return torch.from_numpy(values.astype(np.int64))


def as_pixels(values: np.ndarray[Any, Any], where: str) -> np.ndarray[Any, Any]:
    """Checked pixels of any shape: uint8, or float32 in [0, 1].

    Raises:
        DataError: the values are not numbers, not finite, or outside 0-255 (integers) or [0, 1] (floats).
    """
    if values.dtype == np.uint8 or not values.size:
        return values.astype(np.uint8)
    if np.issubdtype(values.dtype, np.integer):
        if values.min() < 0 or values.max() > 255:
            hint = "Give uint8 pixels, or floats in [0, 1]."
            raise DataError(f"{where} holds integer pixels from {values.min()} to {values.max()}, not 0 to 255.", hint)
        return values.astype(np.uint8)
    if not np.issubdtype(values.dtype, np.floating):
        raise DataError(f"{where} holds pixels of type {values.dtype}.", "Give uint8 pixels, or floats in [0, 1].")
    return _as_unit_floats(values, where)


def _as_unit_floats(values: np.ndarray[Any, Any], where: str) -> np.ndarray[Any, Any]:
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError(f"{where} holds pixels that are NaN or infinite.", "Remove or repair these images.")
    rounding = 1e-6
    if low < -rounding:
        hint = "Give images in [0, 1] and name the normalisation instead (--normalize)."
        raise DataError(f"{where} holds float pixels from {low:.3g} to {high:.3g}; they look normalised already.", hint)
    if high > 1 + rounding:
        looks = "they look like 0 to 255" if 2 < high <= 255 else "the range is unknown"
        hint = "Divide by 255, or give uint8 pixels; floats must lie in [0, 1]."
        raise DataError(f"{where} holds float pixels from {low:.3g} to {high:.3g}; {looks}.", hint)
    return values.astype(np.float32).clip(0.0, 1.0)


def as_class_names(names: Sequence[object]) -> tuple[str, ...]:
    """Names that are safe to print: strings without control characters, at most 64 characters each."""
    return tuple("".join(c for c in str(name) if c.isprintable())[:64] for name in names)
