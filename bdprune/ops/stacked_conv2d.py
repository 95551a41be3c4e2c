"""The convolutions of a stack of models, and the CUDA kernels for them with their autograd."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bdprune.ops import _backend
from bdprune.ops._check import check_floating, new_maps
from bdprune.ops.conv_variants import Run, Settings, by_library, check_conv, choose, conv2d, grouped

_ops = torch.ops.bdprune

Pair = tuple[int, int]
Setting = tuple[Pair, Pair, Pair, int]
"""Stride, padding, dilation and groups as numbers."""


def stacked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """The convolutions of G models in one call; on the CPU, bit for bit those of G calls.

    Args:
        x: ``[G, N, I, H, W]``, or one batch ``[N, I, H, W]`` for all models.
        weight: ``[G, O, I / groups, kh, kw]``.
        bias: ``[G, O]`` or None.
        stride: as in :func:`torch.nn.functional.conv2d`, like the next three.
        padding: a number, a pair, ``"same"`` or ``"valid"``.
        dilation: a number or a pair.
        groups: divides I and O.

    Returns:
        ``[G, N, O, H', W']``; each model's part has the layout of a single convolution.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes do not match.

    >>> stacked_conv2d(torch.ones(1, 1, 2, 2), torch.ones(2, 1, 1, 2, 2)).flatten()
    tensor([4., 4.])
    """
    check_floating("x", x)
    check_floating("weight", weight)
    if weight.dim() != 5:
        raise ValueError(f"weight must have 5 dimensions, got shape {list(weight.shape)}")
    check_conv(x, weight, bias, len(weight), groups)
    return convolve(x, weight, None, bias, (stride, padding, dilation, groups))


def convolve(x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, settings: Settings) -> Tensor:
    """The masked convolution by the chosen variant."""
    setting = setting_of(weight, *settings) if takes(x) else None
    if setting is None:
        return by_library(partial(conv2d, settings), x, weight, mask, bias)
    variants = _variants(setting, settings, x, weight, mask)
    return variants[choose(variants, (x, weight, mask, bias), setting)](x, weight, mask, bias)


def _variants(setting: Setting, settings: Settings, x: Tensor, weight: Tensor, mask: Tensor | None) -> dict[str, Run]:
    """The possible variants, the safest first: bdprune's kernel for a stack, the library for a single convolution."""
    library = partial(by_library, partial(conv2d, settings))
    if x.dim() == 4 and weight.dim() == 4 and mask is not None and mask.dim() == 2:
        return {"library": library}  # there is only one convolution
    kernel = partial(run, setting=setting)
    if weight.dim() == 4 or len(weight) == 1:
        return {"library": library, "kernel": kernel}
    return {"kernel": kernel, "library": library, "grouped": partial(grouped, settings)}


def takes(x: Tensor) -> bool:
    """Whether the kernels support the dtype of the tensor: they do not support float64."""
    return x.is_cuda and _backend.is_native(x) and x.dtype in (torch.float16, torch.bfloat16, torch.float32)


def setting_of(
    weight: Tensor,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] | str,
    dilation: int | tuple[int, int],
    groups: int,
) -> Setting | None:
    """The arguments of a convolution as numbers; None for a padding mode that only PyTorch supports."""
    steps, spread = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        reach = [spread[axis] * (weight.shape[axis - 2] - 1) if padding == "same" else 0 for axis in (0, 1)]
        if any(total % 2 for total in reach) or (padding == "same" and steps != (1, 1)):
            return None
        return steps, (reach[0] // 2, reach[1] // 2), spread, groups
    return steps, _pair(padding), spread, groups


def run(x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, setting: Setting) -> Tensor:
    """``mask * (conv(x, weight) + bias)``, differentiable once in all four.

    Args:
        x: ``[G, N, I, H, W]`` or ``[N, I, H, W]``.
        weight: ``[G, O, I / groups, kh, kw]``, or ``[O, I / groups, kh, kw]``, which all models share without a copy.
        mask: ``[G, O]``, ``[O]`` with such an x and weight, or None if each model has its own weights.
        bias: in the shape of the weight's filters, or None.
        setting: result of :func:`setting_of`.
    """
    if mask is not None and mask.dim() == 1:
        return run(x[None], weight[None], mask[None], None if bias is None else bias[None], setting).squeeze(0)
    if weight.dim() == 4 and mask is not None:
        weight, bias = weight[None], None if bias is None else bias.expand(mask.shape)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    factors = weight.new_ones(weight.shape[:2], dtype=torch.float32) if mask is None else mask.float()
    product: Tensor = _StackedConv.apply(x, weight, factors, None if bias is None else bias.float(), setting)  # type: ignore[no-untyped-call]
    return product


class _StackedConv(torch.autograd.Function):
    """Runs at most two convolutions backward if the weight is frozen: none of them computes the masked gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, setting: Setting) -> Tensor:
        need_z = ctx.needs_input_grad[2]
        y, z = _ops.stacked_conv2d(x, weight, mask.contiguous(), _dense(bias), *setting, need_z, _exact())
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, mask, z if need_z else None)
        ctx.setting, ctx.x_shape = setting, x.shape
        product: Tensor = y
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, z = ctx.saved_tensors
        need_x, need_weight, need_mask, need_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_mask = grad_bias = None
        if need_x:
            # Includes the mask's gradient in the same launch, if z was kept for it.
            rest = (mask.contiguous(), *ctx.x_shape[-2:], *ctx.setting, _exact())
            grad_x, grad_mask = _ops.stacked_conv2d_backward(grad, z, weight, *rest)
            grad_x = grad_x if len(ctx.x_shape) == 5 else grad_x.sum(0)
        elif need_mask:
            grad_mask = _ops.channel_scale_backward(grad, z, mask, False, True)[1]
        if need_weight or need_bias:
            grad_z = _ops.channel_scale(grad, mask)
            grad_weight = _weight_gradient(grad_z, x, weight, ctx.setting) if need_weight else None
            grad_bias = grad_z.float().sum((1, 3, 4)) if need_bias else None
        return grad_x, grad_weight, grad_mask if need_mask else None, grad_bias, None


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, setting: Setting) -> Tensor:
    """By the library, as one convolution with G times the groups, or over all batches if they share a weight."""
    stride, padding, dilation, groups = setting
    stack = len(weight)
    inputs = x.expand(len(grad), *x.shape) if x.dim() == 4 else x
    side_by_side = [maps.transpose(0, 1).flatten(1, 2) if stack > 1 else maps.flatten(0, 1) for maps in (grad, inputs)]
    _, flat, _ = torch.ops.aten.convolution_backward(
        *side_by_side,
        weight.flatten(0, 1),
        None,
        stride,
        padding,
        dilation,
        False,
        (0, 0),
        stack * groups,
        (False, True, False),
    )
    gradient: Tensor = flat.view(weight.shape)
    return gradient


def _exact() -> bool:
    """Whether float32 convolutions must not be rounded to TF32; follows PyTorch's own setting."""
    return not torch.backends.cudnn.allow_tf32


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _pair(value: int | tuple[int, int]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _fake(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    stride, padding, dilation, _, need_z, _ = settings
    maps = x if x.dim() == 5 else x.unsqueeze(0)
    size = [
        (x.shape[axis - 2] + 2 * padding[axis] - dilation[axis] * (weight.shape[axis - 2] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    ]
    one = new_maps(maps.flatten(0, 1), *maps.shape[:2], weight.shape[1], *size)
    y = one.new_empty_strided((mask.shape[0], *one.shape[1:]), one.stride())
    return y, torch.empty_like(y) if need_z else x.new_empty(0)


def _fake_backward(
    grad: Tensor,
    z: Tensor | None,
    weight: Tensor,
    mask: Tensor,
    height: int,
    width: int,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    groups = settings[3]
    like = grad if z is None else z
    grad_x = new_maps(like.flatten(0, 1), *like.shape[:2], weight.shape[2] * groups, height, width)
    return grad_x, mask.new_empty(mask.shape if z is not None else (0,))


if _backend.HAS_OPS:
    torch.library.register_fake("bdprune::stacked_conv2d", _fake)
    torch.library.register_fake("bdprune::stacked_conv2d_backward", _fake_backward)
