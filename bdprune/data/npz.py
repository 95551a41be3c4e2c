"""Reads NumPy ``.npz`` archives without pickle, and checks every size in them."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from bdprune.data.source import MAX_BYTES, MAX_IMAGES, ImageSource, as_labels, as_pixels
from bdprune.errors import DataError

IMAGE_KEYS = ("images", "x", "X", "data", "x_test")
_LARGE = 64 << 20
_MAX_RATIO = 200
"""Largest accepted compression ratio of a large array; photographs stay below 10."""
LABEL_KEYS = ("labels", "y", "Y", "targets", "label", "y_test")


class NpzSource(ImageSource):
    """Images and labels of an ``.npz`` archive.

    Images are ``[N, H, W]`` (grey), ``[N, H, W, C]`` or ``[N, C, H, W]``. For the last two, ``input_shape`` decides the
    layout if it is given, else the axis of size 1 or 3 (channels first if both fit).

    Args:
        path: of the archive.
        input_shape: the model's (C, H, W).
        labelled: False does not read the labels, and gives every image label 0.

    Raises:
        DataError: the file is not an archive of plain arrays, has an impossible size, or does not hold labelled images.
    """

    def __init__(self, path: Path, input_shape: tuple[int, int, int] | None = None, *, labelled: bool = True) -> None:
        super().__init__(str(path))
        try:
            images, labels = _read_arrays(path, labelled)
        except DataError:
            raise
        except Exception as error:  # zipfile, zlib and the header parser fail in many ways on hostile bytes
            raise DataError(
                f"{path} cannot be read as a NumPy archive: {str(error) or type(error).__name__}.",
                "Write it again with numpy.savez(path, images=..., labels=...).",
            ) from error
        self._images = _channels_first(images, self.name, input_shape)
        self.labels = as_labels(np.zeros(len(images), np.int64) if labels is None else labels, self.name)
        if len(self._images) != len(self.labels):
            hint = "Give one label an image."
            raise DataError(f"{path} holds {len(self._images)} images but {len(self.labels)} labels.", hint)

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def read(self, index: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for slot, position in enumerate(index):
            pixels = as_pixels(self._images[position], self.describe(position))
            yield slot, torch.from_numpy(np.ascontiguousarray(pixels))


def _read_arrays(path: Path, labelled: bool) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        images = _pick(members, IMAGE_KEYS, "images", path)
        labels = _pick(members, LABEL_KEYS, "labels", path) if labelled else None
        stack = _read_array(archive, members[images], path)
        return stack, None if labels is None else _read_array(archive, members[labels], path)


def _pick(members: dict[str, zipfile.ZipInfo], keys: tuple[str, ...], kind: str, path: Path) -> str:
    for key in keys:
        if key in members:
            return key
    found = ", ".join(sorted(members)[:8]) or "nothing"
    raise DataError(f"{path} has no {kind}: it holds {found}.", f"Name the array one of {', '.join(keys)}.")


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray[Any, Any]:
    """One array, after a check that its header agrees with its size in the directory and with the limit."""
    if info.file_size > MAX_BYTES:
        hint = f"At most {MAX_BYTES} are read."
        raise DataError(f"{info.filename} in {path} unpacks to {info.file_size} bytes.", hint)
    if info.file_size > _LARGE and info.file_size > _MAX_RATIO * info.compress_size:
        hint = "It may be a zip bomb; if it holds real images, write it again without compression (numpy.savez)."
        raise DataError(f"{info.filename} in {path} unpacks from {info.compress_size} bytes to {info.file_size}.", hint)
    with archive.open(info) as file:
        shape, dtype = _read_header(file, info, path)
        header_bytes = file.tell()
    # The directory bounds the unpacked bytes, so a header that agrees with it can't cause a larger allocation.
    claimed = math.prod(shape) * dtype.itemsize
    if claimed != info.file_size - header_bytes:
        raise DataError(
            f"{info.filename} in {path} claims shape {shape} of {dtype} ({claimed} bytes) "
            f"but has {info.file_size - header_bytes} bytes.",
            "The file is damaged or forged; write it again.",
        )
    with archive.open(info) as file:
        return npy.read_array(file, allow_pickle=False)


def _read_header(file: IO[bytes], info: zipfile.ZipInfo, path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(file)
    if version not in readers:
        raise DataError(f"{info.filename} in {path} is of .npy version {version}.", "Write plain numeric arrays.")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject or dtype.names:
        hint = "Write plain numeric arrays."
        raise DataError(f"{info.filename} in {path} holds Python objects or records, which bdprune never loads.", hint)
    if any(size < 0 for size in shape) or (shape and shape[0] > MAX_IMAGES):
        raise DataError(f"{info.filename} in {path} claims shape {shape}.", f"At most {MAX_IMAGES} images are read.")
    return shape, dtype


def _channels_first(
    images: np.ndarray[Any, Any], where: str, input_shape: tuple[int, int, int] | None
) -> np.ndarray[Any, Any]:
    if images.ndim == 3:
        return images[:, None]
    if images.ndim != 4:
        hint = "Give [N, H, W, C], [N, C, H, W] or [N, H, W]."
        raise DataError(f"The images of {where} have shape {tuple(images.shape)}.", hint)
    channels = {1, 3} if input_shape is None else {1, 3, input_shape[0]}
    first, last = images.shape[1] in channels, images.shape[3] in channels
    if first and last and input_shape is not None:
        first = images.shape[1:] == input_shape or images.shape[1:] != (*input_shape[1:], input_shape[0])
    if first:
        return images
    if last:
        return images.transpose(0, 3, 1, 2)
    raise DataError(f"The images of {where} have shape {tuple(images.shape)}: no axis of 1 or 3 channels.")
