"""Scores the convolutions of a safetensors file with NumPy and the torch-free core; torch is never imported.

For services that receive checkpoints but do not ship torch: the spectral norm of every filter is what the data-free
detectors start from, and reading it costs one pass over the file.
"""

from __future__ import annotations

import itertools
import json
import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdprune.errors import ArtifactError, UnsupportedError

_MAX_HEADER = 100_000_000
"""The limit that safetensors sets for the header, in bytes."""

_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class _Convolution:
    """One weight ``[O, I / groups, kh, kw]`` in the file: its shape, dtype, and first byte."""

    name: str
    shape: tuple[int, int, int, int]
    dtype: str
    start: int

    @property
    def end(self) -> int:
        """The byte behind its last."""
        return self.start + math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def screen(path: str | Path) -> dict[str, NDArray[np.float64]]:
    """Spectral norm of every filter of every convolution in a safetensors file.

    Args:
        path: a safetensors file. Every floating tensor of four dimensions counts as a convolution.

    Returns:
        For each such tensor, by name and in the order of the file, the largest singular value of each filter's
        ``[I / groups, kh * kw]`` matrix: float64 ``[O]``, as exact as those of ``filter_spectral_norms``; NaN for a
        filter that is not finite.

    Raises:
        UnsupportedError: the file is not a safetensors file.
        ArtifactError: it is one, but cannot be read or is damaged: its header names sizes or places that do not fit.

    Sizes are checked against the length of the file before anything is allocated, and nothing in it is executed.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnsupportedError(f"{path} is no regular file.", "Pass a file with the ending .safetensors.")
        size = status.st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            header_bytes = _header_length(path, prefix, size)
            header = file.read(header_bytes)
        tensors = _parse_header(path, header)
        convolutions = sorted(
            _convolutions(path, tensors, 8 + header_bytes, size), key=lambda conv: (conv.start, conv.end)
        )
        for before, after in itertools.pairwise(convolutions):
            if after.start < before.end:
                raise ArtifactError(f"{path} claims the same bytes for {before.name} and {after.name}.")
        if not convolutions:
            return {}
        data = np.memmap(path, dtype=np.uint8, mode="r")
        return {conv.name: _norms(data, conv) for conv in convolutions}
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from error


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= size - 8:
        raise UnsupportedError(f"{path} is not a safetensors file.", "Pass a file with the ending .safetensors.")
    if length > _MAX_HEADER:
        raise ArtifactError(f"{path} has a header of {length} bytes, more than the {_MAX_HEADER} that are allowed.")
    return length


def _parse_header(path: Path, header: bytes) -> dict[str, Any]:
    if not header.startswith(b"{"):
        raise UnsupportedError(f"{path} is not a safetensors file.", "Pass a file with the ending .safetensors.")
    try:
        parsed = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} has a header that cannot be parsed: {error}.") from error
    tensors: dict[str, Any] = {name: entry for name, entry in parsed.items() if name != "__metadata__"}
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a name appears twice")
    return result


def _convolutions(path: Path, tensors: dict[str, Any], data_start: int, size: int) -> Iterator[_Convolution]:
    for name, entry in tensors.items():
        dtype, shape, (begin, end) = _entry(path, name, entry)
        if not 0 <= begin <= end <= size - data_start:
            raise ArtifactError(f"{path} claims bytes {begin} to {end} for {name}, but holds {size - data_start}.")
        if dtype not in _DTYPES or len(shape) != 4:
            continue
        kind = _DTYPES[dtype]
        if math.prod(shape) * _ITEM_BYTES[kind] != end - begin:
            raise ArtifactError(f"{path} claims shape {shape} for {name}, which does not fit its {end - begin} bytes.")
        yield _Convolution(name, (shape[0], shape[1], shape[2], shape[3]), kind, data_start + begin)


def _entry(path: Path, name: str, entry: object) -> tuple[str, list[int], tuple[int, int]]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        ):
            return dtype, shape, (begin, end)
    raise ArtifactError(f"{path} describes the tensor {name[:80]!r} in a way that makes no sense: {str(entry)[:80]}.")


def _norms(data: NDArray[np.uint8], conv: _Convolution) -> NDArray[np.float64]:
    count, channels, height, width = conv.shape
    # A copy is aligned, whatever the file does.
    raw = np.array(data[conv.start : conv.end])
    try:
        from bdprune import _core
    except ImportError:
        return _numpy_norms(raw, conv)
    norms: NDArray[np.float64] = _core.spectral_norms(raw, conv.dtype, count, channels, height * width)
    return norms


def _numpy_norms(raw: NDArray[np.uint8], conv: _Convolution) -> NDArray[np.float64]:
    """The same by plain NumPy, where the core is not built."""
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
