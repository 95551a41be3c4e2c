"""The safetensors reader and writer compared with the reference library, and on false headers."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdprune.errors import ArtifactError, UnsupportedError
from bdprune.files.kinds import looks_like_safetensors
from bdprune.files.safetensors_file import DTYPES, dump_safetensors, read_safetensors


def crafted(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


F32 = json.dumps(entry([1], 0, 4))

tensors = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda name: st.lists(st.integers(0, 4), max_size=3).map(
        lambda shape: (
            (torch.arange(64).repeat(2)[: max(1, int(torch.tensor(shape).prod()))])[: int(torch.tensor(shape).prod())]
            .reshape(shape)
            .to(getattr(torch, DTYPES[name]))
        )
    )
)


@given(
    st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"), tensors, max_size=5)
)
def test_reading_and_writing_agree_with_the_reference_library(state: dict[str, torch.Tensor]) -> None:
    ours = dump_safetensors(state, {"format": "pt"})
    for loaded in (safetensors.torch.load(ours), read_safetensors(safetensors.torch.save(state))[0]):
        assert loaded.keys() == state.keys()
        for name, tensor in state.items():
            assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
            assert torch.equal(loaded[name], tensor)


def test_keeps_order_metadata_and_bytes() -> None:
    state = {"z": torch.ones(2), "a": torch.tensor(3), "m": torch.zeros(1, dtype=torch.float16)}
    data = dump_safetensors(state, {"by": "us"})
    found, metadata = read_safetensors(data)
    assert list(found) == ["z", "a", "m"] and metadata == {"by": "us"}
    assert dump_safetensors(found, metadata) == data


def test_the_format_is_recognised_by_content() -> None:
    assert looks_like_safetensors(dump_safetensors({}, {}))
    assert not looks_like_safetensors(b"PK\x03\x04") and not looks_like_safetensors(b'{"a": 1, "b": {')


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<Q", 1 << 40) + b"{}", "header too large"),
        (struct.pack("<Q", 3) + b"{}", "invalid header length"),
        (crafted(b"{"), "invalid JSON"),
        (crafted(b"{\xff}"), "invalid UTF-8"),
        (crafted(b'{"a": ' + b"[" * 200_000), "recursion limit exceeded"),
        (crafted(b'{"a": ' + b"9" * 5000 + b"}"), "number out of range"),
        (crafted(b'{"a": 1, "a": 2}'), "invalid JSON"),
        (crafted(f'{{"a": {F32}, "a": {F32}}}'.encode(), bytes(4)), "its header has the same name twice"),
        (crafted(b"[]"), "invalid type: sequence"),
        (crafted({"__metadata__": {"a": 1}}), "integer `1`, expected a string"),
        (crafted({"__metadata__": []}), "expected a map"),
        (crafted({"a": 3}), "integer `3`"),
        (crafted({"a": {"dtype": "F32", "shape": [1]}}), "missing field `data_offsets`"),
        (crafted({"a": entry([-1], 0, 4)}, bytes(4)), "integer `-1`"),
        (crafted({"a": entry([True], 0, 4)}, bytes(4)), "boolean `true`"),
        (crafted({"a": entry([1.0], 0, 4)}, bytes(4)), "floating point `1.0`"),  # type: ignore[list-item]
        (crafted({"a": {**entry([4], 0, 4), "dtype": []}}, bytes(4)), "invalid type: sequence"),
        (crafted({"a": entry([1] * 17, 0, 4)}, bytes(4)), "'a' has the impossible shape"),
        (crafted({"a": entry([50_000, 50_000], 0, 10_000_000_000)}, bytes(4)), "not fully covered"),
        (crafted({"a": entry([50_000, 50_000], 0, 4)}, bytes(4)), "invalid shape"),
        (crafted({"a": entry([1], 4, 0)}, bytes(4)), "invalid offset for tensor `a`"),
        (crafted({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)), "invalid offset for tensor `[ab]`"),
        (crafted({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, bytes(6)), "invalid offset for tensor `b`"),
        (crafted({"a": entry([1], 4, 8)}, bytes(8)), "invalid offset for tensor `a`"),
        (crafted({"a": entry([1], 0, 4)}, bytes(5)), "not fully covered"),
        (crafted({"a": entry([1 << 61, 1 << 61, 0], 0, 0)}), "too large for any file"),
        (crafted({"a": entry([0, 1 << 61, 1 << 61], 0, 0)}), "too large for any file|impossible shape"),
    ],
)
def test_false_headers_are_errors(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_safetensors(data)


def test_rare_types_are_named() -> None:
    with pytest.raises(UnsupportedError, match="'F8_E4M3'"):
        read_safetensors(crafted({"a": entry([4], 0, 4, "F8_E4M3")}, bytes(4)))


def test_every_truncation_is_an_error() -> None:
    data = dump_safetensors({"a": torch.ones(3), "b": torch.ones(2, 2)}, {})
    for end in range(8, len(data)):
        with pytest.raises(ArtifactError):
            read_safetensors(data[:end])
