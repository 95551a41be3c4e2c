"""Checkpoints in the safetensors format: 8 bytes of header length, a JSON header, the raw tensors.

The safetensors library checks header, shapes, sizes and offsets; this module checks the rest.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, deserialize, safe_open

from bdprune.errors import ArtifactError, UnsupportedError
from bdprune.files.pickle_claims import MAX_DIMENSIONS
from bdprune.files.quoting import quoted
from bdprune.files.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "BF16": "bfloat16",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
}
"""Type names in the header -> types of torch."""
_NAMES = {f"torch.{dtype}": name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 16 << 20
_HOSTILE = "The file is damaged or hostile; download it again from a source you trust."


def read_safetensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in the order of the header, and the header's metadata. It checks every entry of the header first.

    Raises:
        ArtifactError: header, shapes, types or offsets do not fit the file.
        UnsupportedError: a tensor has an unsupported type.
    """
    try:
        found = dict(deserialize(data))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise damaged_safetensors(error) from None
    header, _ = safetensors_header(data)
    metadata = header.pop("__metadata__", None) or {}
    return {name: _tensor(name, found[name]) for name in header}, metadata


def stored_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, in the order of the header, without reading one.

    Raises:
        ArtifactError: header, shapes, types or offsets do not fit the file.
        UnsupportedError: a tensor has an unsupported type.
    """
    try:
        with safe_open(path, framework="numpy"):  # compares the header with the length of the file
            pass
    except SafetensorError as error:
        raise damaged_safetensors(error) from None
    with path.open("rb") as file:
        size = file.read(8)
        header, start = safetensors_header(size + file.read(min(struct.unpack("<Q", size)[0], _MAX_HEADER_BYTES)))
    header.pop("__metadata__", None)
    return {name: _stored(path, name, entry, start) for name, entry in header.items()}


def _stored(path: Path, name: str, entry: Mapping[str, Any], start: int) -> StoredTensor:
    dtype, shape = _dtype(name, entry["dtype"]), tuple(entry["shape"])
    if len(shape) > MAX_DIMENSIONS:
        raise _impossible(name, shape)
    return StoredTensor(path, dtype if "float" in dtype else "", shape, start + entry["data_offsets"][0])


def safetensors_header(data: bytes | memoryview) -> tuple[dict[str, Any], int]:
    """The header of a file that the library has checked, and the position of the first tensor's first byte.

    Raises:
        ArtifactError: it is very large, or has a name twice, of which the library would use the last.
    """
    end = 8 + struct.unpack("<Q", data[:8])[0]
    if end > _MAX_HEADER_BYTES:
        raise ArtifactError(f"its header has {end - 8} bytes, which is too large.", _HOSTILE)
    header: dict[str, Any] = json.loads(bytes(data[8:end]), object_pairs_hook=_unique)
    return header, end


def damaged_safetensors(error: Exception) -> ArtifactError:
    """The error for a file that the library rejects."""
    reason = str(error).removeprefix("Error while deserializing: ")
    if "overflow" in reason:
        reason = "the shape of a tensor is too large for any file"
    return ArtifactError(f"the safetensors file is damaged: {quoted(reason, 160).strip(chr(39))}.", _HOSTILE)


def dump_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file with ``tensors`` in the given order, which the library would sort."""
    import torch

    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    parts: list[bytes] = []
    offset = 0
    for name, tensor in tensors.items():
        parts.append(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        offsets = [offset, offset := offset + len(parts[-1])]
        header[name] = {"dtype": _NAMES[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *parts])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ArtifactError("its header has the same name twice.", _HOSTILE)
    return dict(pairs)


def _tensor(name: str, entry: Mapping[str, Any]) -> Tensor:
    import torch

    kind, shape, values = entry["dtype"], entry["shape"], entry["data"]
    dtype = getattr(torch, _dtype(name, kind))
    try:
        if len(shape) <= MAX_DIMENSIONS:
            return torch.frombuffer(values, dtype=dtype).reshape(shape) if values else torch.empty(shape, dtype=dtype)
    except RuntimeError:  # an empty tensor with a shape that overflows
        pass
    raise _impossible(name, shape)


def _dtype(name: str, kind: str) -> str:
    if kind not in DTYPES:
        hint = "Save it with a common type such as float32 or float16."
        raise UnsupportedError(f"the tensor {quoted(name)} has the unsupported type {quoted(kind)}.", hint)
    return DTYPES[kind]


def _impossible(name: str, shape: object) -> ArtifactError:
    return ArtifactError(f"the tensor {quoted(name)} has the impossible shape {quoted(shape)}.", _HOSTILE)
