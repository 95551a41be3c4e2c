"""Convolutions of a network by Winograd's algorithm, if that is faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bdprune.ops import (
    masked_conv2d,
    winograd_applies,
    winograd_conv2d,
    winograd_is_faster,
    winograd_masked_conv2d,
)


class WinogradConvs(TorchFunctionMode):
    """A context in which 3x3 convolutions of float32 maps on the CPU run by ``winograd_conv2d`` if that is faster.

    Modules do not change: it intercepts the calls of ``conv2d`` and ``masked_conv2d``, with their backward passes. It
    does nothing under autocast, because the caller wants another precision there.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is masked_conv2d:
            x, weight, mask, bias = args
            if _runs(x, weight, bias, **kwargs):
                return winograd_masked_conv2d(x, weight, mask, bias)
        if func is torch.conv2d:
            call = _arguments(*args, **kwargs)
            if call is not None:
                return winograd_conv2d(*call)
        return func(*args, **kwargs)


def has_winograd_convs(module: nn.Module) -> bool:
    """Whether a convolution of ``module`` qualifies: 3x3, stride and padding 1, one group, float32, on the CPU."""
    return any(
        isinstance(conv, nn.Conv2d)
        and winograd_applies(conv.weight, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        for conv in module.modules()
    )


def _arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The arguments of ``winograd_conv2d`` for a call of ``conv2d``, None if the call is not replaced."""
    runs = input.dim() == 4 and _runs(input, weight, bias, stride, padding, dilation, groups)
    return (input, weight, bias) if runs else None


def _runs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """Whether a convolution, of one model or of a stack, is replaced."""
    able = winograd_applies(x, weight, bias, stride, padding, dilation, groups) and x.dim() >= 4 and 0 not in x.shape
    return able and not torch.is_autocast_enabled("cpu") and winograd_is_faster(x, weight)
