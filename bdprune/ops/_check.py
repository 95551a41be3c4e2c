"""Argument checks shared by the public functions of the ops. Every error includes the value found."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a dense tensor of a floating dtype that the ops take."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")


def check_feature_map(name: str, x: object) -> None:
    """Raises unless ``x`` is a floating tensor ``[N, C]`` or ``[N, C, *]``."""
    check_floating(name, x)
    assert isinstance(x, Tensor)
    if x.dim() < 2:
        raise ValueError(f"{name} must be [N, C] or [N, C, *], got shape {list(x.shape)}")


def check_same_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ValueError unless ``tensor`` is on ``device``."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_mask(mask: object, channels: int, device: torch.device, stack: int | None = None) -> None:
    """Raises unless ``mask`` has one floating value per channel, ``[C]`` or ``[stack, C]``, on ``device``."""
    check_floating("mask", mask)
    assert isinstance(mask, Tensor)
    expected = (channels,) if stack is None else (stack, channels)
    if mask.shape != expected:
        raise ValueError(f"mask must be {list(expected)}, one value per channel, got shape {list(mask.shape)}")
    check_same_device("mask", mask, device)


def is_channels_fastest(x: Tensor) -> bool:
    """Whether ``x`` [N, C, *] is stored as N, *, C without gaps (channels_last)."""
    return x.movedim(1, -1).is_contiguous()


def empty_like_map(x: Tensor, stacked: bool = False) -> Tensor:
    """Allocates an output shaped like ``x``: in x's layout if x is dense, otherwise contiguous.

    A stack ``[G, N, C, *]`` is laid out as the map ``[G * N, C, *]``.
    """
    if stacked:
        return empty_like_map(x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])).view(x.shape)
    if x.is_contiguous() or is_channels_fastest(x):
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def new_maps(like: Tensor, *shape: int) -> Tensor:
    """Allocates maps ``[*, C, h, w]`` of this shape, in the layout of the map ``like`` ``[N, C, H, W]``."""
    if like.is_contiguous() or not is_channels_fastest(like):
        return like.new_empty(shape)
    *leading, channels, height, width = shape
    return like.new_empty(*leading, height, width, channels).movedim(-1, -3)
