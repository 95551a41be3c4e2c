"""Triggers as bytes: read back equal, and refused where anything in them is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from bdprune.analysis import dump_trigger, parse_trigger
from bdprune.errors import ArtifactError, UnsupportedError
from bdprune.files import dump_safetensors
from bdprune.loops import Trigger


def patch() -> Trigger:
    mask, pattern = torch.zeros(1, 6, 8), torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(0))
    mask[0, 4:, 5:] = 0.9
    return Trigger(mask, pattern, target=8, sources=(1, 3), flip_rate=0.97, images=250)


def additive() -> Trigger:
    return Trigger(None, torch.linspace(-1, 1, 16).reshape(1, 4, 4), target=None, kind="additive")


def content(
    tensors: Mapping[str, Tensor] | None = None, record: Mapping[str, Any] | None = None, **metadata: str
) -> bytes:
    """The bytes of a patch trigger, some of them changed."""
    one = patch()
    assert one.mask is not None
    known = json.loads(one.info.to_json()) | dict(record or {})
    named = {"mask": one.mask, "pattern": one.pattern} if tensors is None else dict(tensors)
    return dump_safetensors(named, {"format": "bdprune.trigger", "trigger": json.dumps(known), **metadata})


@pytest.mark.parametrize("before", [patch(), additive()], ids=["patch", "additive"])
def test_a_trigger_is_read_back_equal(before: Trigger) -> None:
    after = parse_trigger(dump_trigger(before))
    assert after.info == before.info
    assert torch.equal(after.pattern, before.pattern)
    assert after.mask is None if before.mask is None else torch.equal(after.mask, before.mask)  # type: ignore[arg-type]
    assert dump_trigger(after) == dump_trigger(before)


def test_half_precision_is_read_as_float32() -> None:
    one = patch()
    assert one.mask is not None
    found = parse_trigger(content({"mask": one.mask.half(), "pattern": one.pattern.double()}))
    assert found.mask is not None and found.mask.dtype == found.pattern.dtype == torch.float32


def test_size_and_box_come_from_the_tensors_not_from_the_record() -> None:
    found = parse_trigger(content(record={"size": 1.0, "box": None, "file": "../../up", "attachment": "x"}))
    assert found.info == patch().info


MASK, PATTERN = torch.zeros(1, 6, 8), torch.zeros(3, 6, 8)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"pattern": PATTERN}, "it has the tensors"),
        ({"mask": MASK, "pattern": PATTERN, "more": MASK}, "it has the tensors"),
        ({"mask": MASK, "pattern": PATTERN[0]}, r"its pattern is torch.float32 \[6, 8\]"),
        ({"mask": MASK, "pattern": PATTERN.int()}, "its pattern is torch.int32"),
        ({"mask": MASK, "pattern": torch.zeros(3, 0, 8)}, r"its pattern is torch.float32 \[3, 0, 8\]"),
        ({"mask": MASK, "pattern": PATTERN - 0.5}, "its pattern has values from -0.5 to -0.5, not from 0 to 1"),
        ({"mask": MASK + 2, "pattern": PATTERN}, "its mask has values from 2 to 2"),
        ({"mask": MASK / 0, "pattern": PATTERN}, "its mask has values from nan to nan"),
        ({"mask": torch.zeros(1, 6, 9), "pattern": PATTERN}, r"its mask \[1, 6, 9\] does not fit its pattern"),
        ({"mask": torch.zeros(3, 6, 8), "pattern": PATTERN}, "does not fit its pattern"),
    ],
)
def test_tensors_that_are_not_a_trigger_are_refused(tensors: Mapping[str, Tensor], reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason) as caught:
        parse_trigger(content(tensors))
    assert caught.value.hint


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "warp"},
        {"kind": "additive"},
        {"target_label": -1},
        {"source_labels": [-2]},
        {"flip_rate": 1.5},
        {"images": -1},
        {"surprise": 1},
    ],
)
def test_a_damaged_record_is_refused(record: Mapping[str, Any]) -> None:
    with pytest.raises(ArtifactError):
        parse_trigger(content(record=record))
    with pytest.raises(ArtifactError):
        parse_trigger(content(trigger="{"))


def test_other_bytes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="without a trigger"):
        parse_trigger(dump_safetensors({"mask": MASK, "pattern": PATTERN}, {}))
    whole = dump_trigger(patch())
    for damaged in (b"", b"\x80\x02}.", whole[:-1], whole[:40], re.sub(rb"F32", b"F64", whole)):
        with pytest.raises(ArtifactError):
            parse_trigger(damaged)
