"""Convolutions of a network by Winograd's algorithm, wherever that is faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bdprune.ops import masked_conv2d, winograd_conv2d
from bdprune.ops.winograd import fits, pays, takes


class WinogradConvs(TorchFunctionMode):
    """Within it, 3x3 convolutions of float32 maps on the CPU run by ``winograd_conv2d`` where that ``pays``.

    Modules stay as they are: what is taken over are the calls of ``conv2d`` and ``masked_conv2d``, with their backward
    passes. Under autocast nothing is: there the caller wants another precision.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is masked_conv2d:
            return masked_conv2d(*args, **{**kwargs, "winograd": True})
        if func is torch.conv2d:
            call = _arguments(*args, **kwargs)
            if call is not None and pays(*call[:2]):
                return winograd_conv2d(*call)
        return func(*args, **kwargs)


def has_winograd_convs(module: nn.Module) -> bool:
    """Whether a convolution of ``module`` may run so: 3x3, stride and padding 1, one group, float32, on the CPU."""
    return any(
        isinstance(conv, nn.Conv2d)
        and fits(conv.weight, conv.stride, conv.padding, conv.dilation, conv.groups)
        and takes(conv.weight, conv.weight, conv.bias)
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
    """The arguments of ``winograd_conv2d`` for a call of ``conv2d``, None where it cannot do the same."""
    can = fits(weight, stride, padding, dilation, groups) and input.dim() == 4 and 0 not in input.shape
    can = can and takes(input, weight, bias) and not torch.is_autocast_enabled(input.device.type)
    return (input, weight, bias) if can else None
