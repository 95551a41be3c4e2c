"""Scores the convolutions of a safetensors file with NumPy and the torch-free core; torch is never imported.

For services that receive checkpoints but do not ship torch. The data-free detectors start from the spectral norms of
the filters; computing them takes one pass over the file.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bdprune.errors import ArtifactError, UnsupportedError
from bdprune.files import damaged_safetensors, looks_like_safetensors, safetensors_header

_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class _Convolution:
    """One weight ``[O, I / groups, kh, kw]`` in the file: its shape, dtype, and bytes."""

    shape: tuple[int, int, int, int]
    dtype: str
    place: slice


def screen(path: str | Path) -> dict[str, NDArray[np.float64]]:
    """Spectral norm of every filter of every convolution in a safetensors file.

    Args:
        path: a safetensors file. Every floating tensor of four dimensions counts as a convolution.

    Returns:
        For each such tensor, by name and in the order of the file, the largest singular value of each filter's
        ``[I / groups, kh * kw]`` matrix: float64 ``[O]``, as exact as ``filter_spectral_norms``; NaN for a filter
        that is not finite.

    Raises:
        UnsupportedError: the file is not a safetensors file.
        ArtifactError: the file cannot be read or is damaged: sizes or offsets in its header do not fit.

    It compares sizes with the length of the file before it allocates memory, and executes nothing from the file.
    """
    try:
        data, header, start = _open(Path(path))
        return {name: _norms(data, conv) for name, conv in _convolutions(header, start)}
    except ArtifactError as error:
        raise type(error)(f"Cannot screen {path}: {error.message}", error.hint) from None


def _open(path: Path) -> tuple[NDArray[np.uint8], dict[str, Any], int]:
    """The mapped file, its header, and the offset of its first tensor."""
    hint = "Pass a file with the ending .safetensors."
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnsupportedError("it is not a regular file.", hint)
        with path.open("rb") as file:
            if not looks_like_safetensors(file.read(9)):
                raise UnsupportedError("it is not a safetensors file.", hint)
        with safe_open(path, framework="numpy"):  # compares the header with the length of the file
            data = np.memmap(path, dtype=np.uint8, mode="r")
            return data, *safetensors_header(data.data)
    except SafetensorError as error:
        raise damaged_safetensors(error) from None
    except OSError as error:
        raise ArtifactError(f"it cannot be read: {error.strerror or error}.") from error


def _convolutions(header: Mapping[str, Any], data_start: int) -> Iterator[tuple[str, _Convolution]]:
    """Names and places, in the order of the file."""
    tensors = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in sorted(tensors, key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] in _DTYPES and len(entry["shape"]) == 4:
            begin, end = entry["data_offsets"]
            place = slice(data_start + begin, data_start + end)
            yield name, _Convolution(tuple(entry["shape"]), _DTYPES[entry["dtype"]], place)


def _norms(data: NDArray[np.uint8], conv: _Convolution) -> NDArray[np.float64]:
    count, channels, height, width = conv.shape
    # A copy is aligned; the tensor in the file may not be.
    raw = np.array(data[conv.place])
    try:
        from bdprune import _core
    except ImportError:
        return _numpy_norms(raw, conv)
    norms: NDArray[np.float64] = _core.spectral_norms(raw, conv.dtype, count, channels, height * width)
    return norms


def _numpy_norms(raw: NDArray[np.uint8], conv: _Convolution) -> NDArray[np.float64]:
    """The same in plain NumPy, for installations without the compiled core."""
    count, channels, height, width = conv.shape
    if conv.dtype == "bfloat16":
        values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = raw.view(conv.dtype)
    matrices = values.reshape(count, channels, height * width).astype(np.float64)
    norms = np.zeros(count)
    if matrices.size:
        finite = np.isfinite(matrices).all(axis=(1, 2))
        norms[finite] = np.linalg.svd(matrices[finite], compute_uv=False).max(axis=1)
        norms[~finite] = np.nan
    return norms
