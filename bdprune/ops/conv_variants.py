"""The variants of a masked convolution, and the choice between them on a GPU for each shape: the tuner's question
``conv``.

The variants are ``kernel`` (one launch of bdprune's kernel for all models, :mod:`bdprune.ops.stacked_conv2d`),
``library`` (PyTorch's convolutions, one model after another, and one fused mask kernel) and ``grouped`` (one PyTorch
convolution with G times the groups).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from bdprune.ops._check import is_channels_fastest
from bdprune.ops.channel_scale import channel_scale
from bdprune.ops.tuner import Timer, fastest

Settings = tuple[int | tuple[int, int], int | tuple[int, int] | str, int | tuple[int, int], int]
"""Stride, padding, dilation and groups, as passed by a caller."""

Convolution = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Convolution of one model, from x, weight and bias."""

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""x, weight, mask and bias of a masked convolution."""

Run = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def check_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stack: int | None, groups: int) -> None:
    """Raises an error unless the shapes fit; does not check the mask."""
    for name, value in (("x", x), ("weight", weight)):
        if value.dim() != 4 and (value.dim() != 5 or value.shape[0] != stack):
            more = "" if stack is None else f", or 5 with {stack} first as in the mask"
            raise ValueError(f"{name} must have 4 dimensions{more}, got shape {list(value.shape)}")
    if groups < 1 or x.shape[-3] != weight.shape[-3] * groups or weight.shape[-4] % groups:
        shapes = f"{list(x.shape)}, {list(weight.shape)} and groups={groups}"
        raise ValueError(f"the channels of x and weight do not match, got {shapes}")
    if bias is not None and bias.shape != weight.shape[:-3]:
        raise ValueError(f"bias must be {list(weight.shape[:-3])}, got shape {list(bias.shape)}")


def by_library(conv: Convolution, x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """Convolutions of one model after another, and the fused mask."""
    if weight.dim() == 5:
        z = _one_by_one(conv, x, weight, bias)
    else:
        z = conv(x if x.dim() == 4 else x.flatten(0, 1), weight, bias)
        if mask is not None and mask.dim() == 2:
            z = z.expand(len(mask), *z.shape) if x.dim() == 4 else z.view(*x.shape[:2], *z.shape[1:])
    return z if mask is None else channel_scale(z, mask)


def conv2d(settings: Settings, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's."""
    stride, padding, dilation, groups = settings
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _one_by_one(conv: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    batches = x.unbind() if x.dim() == 5 else [x] * len(weight)
    biases = [None] * len(weight) if bias is None else bias.unbind()
    parts = [conv(*one) for one in zip(batches, weight.unbind(), biases, strict=True)]
    # Concatenated along the batch, which keeps channels_last; a new axis would lose it.
    return torch.cat(parts).view(len(weight), *parts[0].shape)


def grouped(settings: Settings, x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """All models concatenated along the channels of one convolution; a shared batch needs no groups for that."""
    stack, groups = len(weight), settings[3]
    flat_bias = None if bias is None else bias.flatten()
    if x.dim() == 4 and groups == 1:
        wide, together = x, 1
    else:
        batches = x.expand(stack, *x.shape) if x.dim() == 4 else x
        wide, together = batches.transpose(0, 1).flatten(1, 2), stack * groups
    z = conv2d((*settings[:3], together), wide, weight.flatten(0, 1), flat_bias)
    z = z.unflatten(1, (stack, -1)).transpose(0, 1)
    return z if mask is None else channel_scale(z, mask)


def choose(variants: Mapping[str, Run], operands: Operands, setting: object, timer: Timer | None = None) -> str:
    """The variant for these operands.

    Args:
        variants: functions by name; the first is the default when no trial is possible.
        operands: the tensors to convolve; a trial does not change them or their gradients.
        setting: stride and so on, whose ``repr`` is part of the shape's name.
        timer: as in :func:`bdprune.ops.tuner.fastest`.

    Raises:
        OptionError: BDPRUNE_TUNE has an unknown value.
    """
    if torch.compiler.is_compiling():
        return next(iter(variants))
    passes = {name: functools.partial(_one_pass, run, operands) for name, run in variants.items()}
    return fastest("conv", _shape_name(operands, setting), operands[0].device, passes, timer=timer).winner


def _one_pass(run: Run, operands: Operands) -> None:
    x, weight, mask, bias = (
        None if operand is None else operand.detach().requires_grad_(operand.requires_grad) for operand in operands
    )
    assert x is not None and weight is not None
    y = run(x, weight, mask, bias)
    leaves = [leaf for leaf in (x, weight, mask, bias) if leaf is not None and leaf.requires_grad]
    if y.requires_grad:
        torch.autograd.grad(y, leaves, y.detach())


def _shape_name(operands: Operands, setting: object) -> str:
    """Shapes in words. Batch sizes are rounded to powers of two, so a smaller last batch needs no trial."""
    x, weight, mask, bias = operands
    sizes = list(x.shape)
    sizes[-4] = 1 << max(sizes[-4] - 1, 0).bit_length()
    masked = "" if mask is None else f", mask {list(mask.shape)}"
    names = zip("xwmb", operands, strict=True)
    grads = "".join(name for name, value in names if value is not None and value.requires_grad)
    grads = grads if torch.is_grad_enabled() and grads else "none"
    kind = str(_dtype_of(x)).removeprefix("torch.") + (", TF32" if torch.backends.cudnn.allow_tf32 else "")
    return (
        f"x {sizes} {kind} {_layout(x)}, weight {list(weight.shape)} {_layout(weight)}{masked}"
        f"{', bias' if bias is not None else ''}, {setting}, gradients {grads}"
    )


def _dtype_of(x: Tensor) -> torch.dtype:
    """The dtype of the convolution."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _layout(x: Tensor) -> str:
    one = x[0] if x.dim() == 5 and len(x) else x
    return "channels_last" if not one.is_contiguous() and is_channels_fastest(one) else "NCHW"
