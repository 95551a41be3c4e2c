"""Convolutions of a network by Winograd's algorithm, wherever that is faster here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bdprune.ops import winograd_conv2d
from bdprune.ops.trial import ROUNDS, least_seconds
from bdprune.ops.winograd import takes

_IMAGES = (16, 64)  # of one trial, at least and at most
_PIXELS = 4096  # of a trial's maps: on fewer the transforms of wide filters, done once a batch, would seem too dear

_faster: dict[Any, bool] = {}


class WinogradConvs(TorchFunctionMode):
    """Within it, 3x3 convolutions of float32 maps on the CPU run by ``winograd_conv2d`` where it is the faster one.

    Modules stay as they are: what is taken over is the call of ``conv2d``, with its backward pass. Which one is faster
    is measured once a process for each shape of maps and filters and what asks for a gradient.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d:
            call = _arguments(*args, **kwargs)
            if call is not None and _is_faster(*call):
                return winograd_conv2d(*call)
        return func(*args, **kwargs)


def has_winograd_convs(module: nn.Module) -> bool:
    """Whether a convolution of ``module`` may run so: 3x3, stride and padding 1, one group, float32, on the CPU."""
    return any(
        isinstance(conv, nn.Conv2d)
        and _fits(conv.weight, conv.stride, conv.padding, conv.dilation, conv.groups)
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
    fits = _fits(weight, stride, padding, dilation, groups) and input.dim() == 4 and 0 not in input.shape
    return (input, weight, bias) if fits and takes(input, weight, bias) else None


def _fits(weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    ones = all(value in (1, (1, 1), [1, 1]) for value in (stride, dilation))
    return weight.shape[2:] == (3, 3) and ones and padding in (1, (1, 1), [1, 1], "same") and groups == 1


def _is_faster(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    learns = torch.is_grad_enabled()
    needs = (learns and x.requires_grad, learns and weight.requires_grad)
    key = (x.shape[1:], len(weight), needs, torch.get_num_threads())
    if key not in _faster:
        _faster[key] = _measure(x, weight, needs)
    return _faster[key]


def _measure(x: Tensor, weight: Tensor, needs: tuple[bool, bool]) -> bool:
    """Times both, forward and backward, on copies of one image."""
    count = min(max(_PIXELS // x.shape[2:].numel(), _IMAGES[0]), _IMAGES[1])
    copies = x[:1].detach().expand(count, -1, -1, -1)
    some = copies.contiguous(memory_format=torch.channels_last).requires_grad_(needs[0])
    filters = weight.detach().clone().requires_grad_(needs[1])
    wanted = [one for one in (some, filters) if one.requires_grad]

    def run(conv: Callable[[Tensor, Tensor], Tensor]) -> None:
        out = conv(some, filters)
        if wanted:
            torch.autograd.grad(out, wanted, out.detach())

    ours, direct = least_seconds(x.device, ROUNDS, partial(run, winograd_conv2d), partial(run, _direct))
    return ours < direct


def _direct(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.conv2d(x, weight, padding=1)
