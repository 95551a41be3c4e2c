"""A trigger as the bytes of a safetensors file: ``pattern``, ``mask`` for a patch, and its record in the header."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from bdprune.errors import ArtifactError, DataError, UnsupportedError
from bdprune.files import dump_safetensors, quoted, read_safetensors
from bdprune.loops import Trigger
from bdprune.record import TriggerInfo

_FORMAT = "bdprune.trigger"
_FAR = 4096.0  # pixels; no image that is worth a scan is larger
_RANGES = {"patch": (0.0, 1.0), "additive": (-1.0, 1.0), "warp": (-_FAR, _FAR)}
_AGAIN = "Recover the trigger again with `bdprune invert`."


def dump_trigger(trigger: Trigger) -> bytes:
    """The bytes of a safetensors file with the trigger: equal triggers give equal bytes."""
    named = {"mask": trigger.mask, "pattern": trigger.pattern}
    tensors = {name: value.detach().float().cpu() for name, value in named.items() if value is not None}
    return dump_safetensors(tensors, {"format": _FORMAT, "trigger": trigger.info.to_json(indent=None)})


def parse_trigger(content: bytes) -> Trigger:
    """The trigger of :func:`dump_trigger`. It runs no code and checks names, types, shapes and values.

    Raises:
        ArtifactError: the bytes are damaged, or their tensors are not those of a trigger.
        UnsupportedError: the bytes are a safetensors file without a trigger.
    """
    tensors, metadata = read_safetensors(content)
    if metadata.get("format") != _FORMAT:
        raise UnsupportedError("it is a safetensors file without a trigger of bdprune.", "Give a file of that command.")
    try:
        info = TriggerInfo.from_json(metadata.get("trigger", ""))
    except DataError as error:
        raise ArtifactError(f"its record of the trigger is damaged: {error.message}", _AGAIN) from None
    wanted = {"mask", "pattern"} if info.kind == "patch" else {"pattern"}
    if tensors.keys() != wanted:
        _refuse(f"it has the tensors {quoted(sorted(tensors))}, not {sorted(wanted)}")
    pattern = _checked("pattern", tensors["pattern"], *_RANGES[info.kind])
    mask = _checked("mask", tensors["mask"], 0.0, 1.0) if info.kind == "patch" else None
    if info.kind == "warp" and len(pattern) != 2:
        _refuse(f"its displacement has {len(pattern)} directions, not 2")
    if mask is not None and mask.shape != (1, *pattern.shape[1:]):
        _refuse(f"its mask {list(mask.shape)} does not fit its pattern {list(pattern.shape)}")
    return Trigger(mask, pattern, info.target_label, info.source_labels, info.flip_rate, info.images, info.kind)


def _checked(name: str, value: Tensor, low: float, high: float) -> Tensor:
    """The tensor, if it is ``[channels, height, width]`` with values from ``low`` to ``high``."""
    if value.dim() != 3 or not value.numel() or not value.is_floating_point():
        _refuse(f"its {name} is {value.dtype} {list(value.shape)}, not floating-point [channels, height, width]")
    least, most = (float(end) for end in value.float().aminmax())
    if not (low <= least and most <= high):  # also refuses NaN
        _refuse(f"its {name} has values from {least:g} to {most:g}, not from {low:g} to {high:g}")
    return value.to(torch.float32, copy=True)


def _refuse(what: str) -> NoReturn:
    raise ArtifactError(f"{what}.", _AGAIN)
