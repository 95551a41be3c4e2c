"""Checkpoints in the safetensors format: 8 bytes of header length, a JSON header, the raw tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from bdprune.errors import ArtifactError, UnsupportedError
from bdprune.files.pickle_walk import MAX_DIMENSIONS, shown

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Names in the header, and those of torch."""
_ITEM_BYTES = {name: 1 if name == "BOOL" else int(name.lstrip("BFIU")) // 8 for name in DTYPES}
_NAMES = {f"torch.{dtype}": name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 16 << 20
_HOSTILE = "The file is damaged or hostile; fetch it again from a source you trust."


def read_safetensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in the order of the header, and the header's metadata. Every claim is checked before it is believed.

    Raises:
        ArtifactError: header, shapes, types or offsets do not fit the file.
    """
    header, body = _header(data)
    metadata = _metadata(header.pop("__metadata__", {}))
    spans = {name: _span(name, entry, len(body)) for name, entry in header.items()}
    _check_cover(spans, len(body))
    writable = bytearray(body)
    return {name: _tensor(writable, header[name], span) for name, span in spans.items()}, metadata


def dump_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The file with ``tensors`` in the order given."""
    import torch

    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    parts: list[bytes] = []
    offset = 0
    for name, tensor in tensors.items():
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": _NAMES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        parts.append(raw)
        offset += len(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *parts])


def _header(data: bytes) -> tuple[dict[str, Any], memoryview]:
    length = struct.unpack("<Q", data[:8])[0]
    if length > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise ArtifactError(f"the header claims {length} bytes in a file of {len(data)}.", _HOSTILE)
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the header is no valid JSON: {shown(error)}.", _HOSTILE) from None
    if not isinstance(header, dict):
        raise ArtifactError("the header is no JSON object.", _HOSTILE)
    return header, memoryview(data)[8 + length :]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands in it twice")
    return dict(pairs)


def _metadata(entry: object) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise ArtifactError("the metadata are no mapping of strings.", _HOSTILE)
    return entry


def _span(name: str, entry: object, body_bytes: int) -> tuple[int, int]:
    fields = entry if isinstance(entry, dict) else {}
    shape, offsets, kind = fields.get("shape"), fields.get("data_offsets"), fields.get("dtype")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
        raise ArtifactError(f"the header describes the tensor {shown(name)} with no valid shape or offsets.", _HOSTILE)
    if not isinstance(kind, str) or kind not in DTYPES:
        mend = "Save it with a common type such as float32 or float16."
        raise UnsupportedError(f"the tensor {shown(name)} has the type {shown(kind)}.", mend)
    needed = _ITEM_BYTES[kind]
    for length in shape:
        needed *= length
    start, end = offsets
    if end > body_bytes or start > end or end - start != needed:
        raise ArtifactError(
            f"the tensor {shown(name)} of shape {shown(shape)} claims {needed} bytes at offsets {start} to {end} "
            f"of a file with {body_bytes} bytes of tensors.",
            _HOSTILE,
        )
    return start, end


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 62 for number in value)


def _check_cover(spans: Mapping[str, tuple[int, int]], body_bytes: int) -> None:
    """The tensors must tile the body: no overlap, no hole, nothing behind the last one."""
    reached = 0
    for name, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        if start != reached:
            raise ArtifactError(f"the tensor {shown(name)} overlaps another or leaves a hole.", _HOSTILE)
        reached = end
    if reached != body_bytes:
        raise ArtifactError(f"the tensors end at byte {reached} of {body_bytes}.", _HOSTILE)


def _tensor(body: bytearray, entry: Mapping[str, Any], span: tuple[int, int]) -> Tensor:
    import torch

    dtype, shape = getattr(torch, DTYPES[entry["dtype"]]), entry["shape"]
    start, end = span
    if start == end:
        try:
            return torch.empty(shape, dtype=dtype)
        except RuntimeError:
            raise ArtifactError(f"a tensor has the impossible shape {shown(shape)}.", _HOSTILE) from None
    raw = torch.frombuffer(body, dtype=torch.uint8, count=end - start, offset=start)
    # A copy, because the file need not align a tensor to its element size.
    return raw.clone().view(dtype).reshape(shape)
