"""Masks over channels: a fused multiply with its backward, and the masked convolution built on it.

Both take a stack of G models, or G masks of one model, as their leading axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bdprune.ops import _backend, _stacked_conv, reference
from bdprune.ops._check import check_feature_map, check_floating, check_mask, empty_like_map


def channel_scale(z: Tensor, mask: Tensor) -> Tensor:
    """``mask[c] * z[:, c]`` for every channel c; with a mask ``[G, C]``, ``mask[g, c] * z[g, :, c]``.

    Args:
        z: ``[N, C]`` or ``[N, C, *]``, float16, bfloat16, float32 or float64; NCHW and channels_last are read in place.
            ``[G, N, C]`` or ``[G, N, C, *]`` for a stack.
        mask: ``[C]`` or ``[G, C]``, any floating dtype, on z's device.

    Returns:
        The product, in z's dtype and, where z is dense, z's layout. Differentiable once in both arguments; the
        backward is one pass over z and the gradient, and the mask's gradient is summed in float64 in a fixed order, so
        it has the same bits for any number of threads, and in a stack the bits of G calls.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: the shapes or devices do not fit.

    >>> channel_scale(torch.ones(1, 2, 1, 2), torch.tensor([0.5, 0.0]))
    tensor([[[[0.5000, 0.5000]],
    <BLANKLINE>
             [[0.0000, 0.0000]]]])
    """
    check_feature_map("z", z)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        if z.dim() < 3:
            raise ValueError(f"z must be [G, N, C] or [G, N, C, *] for a mask [G, C], got shape {list(z.shape)}")
        check_mask(mask, z.shape[2], z.device, z.shape[0])
    else:
        check_mask(mask, z.shape[1], z.device)
    if not _backend.is_native(z):
        return reference.channel_scale(z, mask)
    product: Tensor = torch.ops.bdprune.channel_scale(z, mask)
    return product


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """``mask[c] * (conv2d(x, weight)[:, c] + bias[c])``: a convolution whose filters fade with their mask.

    The mask acts on the output, not on the weight: that is the same function, but its gradient then needs no gradient
    of the weight. So with a frozen weight a backward pass runs two convolutions instead of three.

    A mask ``[G, O]`` makes it a stack: of G models, each with a weight of its own, or of G masks on one weight. Inputs
    are one batch for each, or one batch for all.

    Args:
        x: ``[N, I, H, W]``, or ``[G, N, I, H, W]`` in a stack.
        weight: ``[O, I / groups, kh, kw]``, or ``[G, O, I / groups, kh, kw]`` in a stack.
        mask: ``[O]``, or ``[G, O]``.
        bias: ``[O]``, ``[G, O]`` with such a weight, or None.
        stride: as in :func:`torch.nn.functional.conv2d`, like the three that follow.
        padding: a number, a pair, ``"same"`` or ``"valid"``.
        dilation: a number or a pair.
        groups: divides I and O.

    Returns:
        ``[N, O, H', W']``, or ``[G, N, O, H', W']``: the same bits as G calls, but for a shared weight, where one
        convolution runs over all batches. Gradients flow to x and mask, and to weight and bias if they ask.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not fit.

    Source: the masks of Wu and Wang, Adversarial Neuron Pruning, NeurIPS 2021, and of Li et al., Reconstructive Neuron
    Pruning, ICML 2023, eq. 2.

    >>> x, weight = torch.ones(1, 1, 2, 2), torch.ones(2, 1, 2, 2)
    >>> masked_conv2d(x, weight, torch.tensor([1.0, 0.25])).flatten()
    tensor([4., 1.])
    """
    check_floating("x", x)
    check_floating("weight", weight)
    check_floating("mask", mask)
    stack = mask.shape[0] if mask.dim() == 2 else None
    _check_conv(x, weight, bias, stack, groups)
    check_mask(mask, weight.shape[-4], x.device, stack)
    if stack is None:
        return channel_scale(F.conv2d(x, weight, bias, stride, padding, dilation, groups), mask)
    if weight.dim() == 5:
        setting = _stacked_conv.setting_of(weight, stride, padding, dilation, groups)
        if setting and _stacked_conv.takes(x, weight):
            return _stacked_conv.run(x, weight, mask, bias, setting)
        return channel_scale(stacked_conv2d(x, weight, bias, stride, padding, dilation, groups), mask)
    z = F.conv2d(x if x.dim() == 4 else x.flatten(0, 1), weight, bias, stride, padding, dilation, groups)
    return channel_scale(z.expand(stack, *z.shape) if x.dim() == 4 else z.view(*x.shape[:2], *z.shape[1:]), mask)


def stacked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """The convolutions of G models in one call, with the bits of G calls on the CPU.

    Args:
        x: ``[G, N, I, H, W]``, or one batch ``[N, I, H, W]`` for all.
        weight: ``[G, O, I / groups, kh, kw]``.
        bias: ``[G, O]`` or None.
        stride: as in :func:`torch.nn.functional.conv2d`, like the three that follow.
        padding: a number, a pair, ``"same"`` or ``"valid"``.
        dilation: a number or a pair.
        groups: divides I and O.

    Returns:
        ``[G, N, O, H', W']``; each model's part has the layout that its convolution alone would have.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes do not fit.

    >>> stacked_conv2d(torch.ones(1, 1, 2, 2), torch.ones(2, 1, 1, 2, 2)).flatten()
    tensor([4., 4.])
    """
    check_floating("x", x)
    check_floating("weight", weight)
    if weight.dim() != 5:
        raise ValueError(f"weight must have 5 dimensions, got shape {list(weight.shape)}")
    _check_conv(x, weight, bias, len(weight), groups)
    setting = _stacked_conv.setting_of(weight, stride, padding, dilation, groups)
    if setting and _stacked_conv.takes(x, weight):
        return _stacked_conv.run(x, weight, None, bias, setting)
    batches = x.unbind() if x.dim() == 5 else [x] * len(weight)
    biases = [None] * len(weight) if bias is None else bias.unbind()
    parts = [
        F.conv2d(*one, stride, padding, dilation, groups) for one in zip(batches, weight.unbind(), biases, strict=True)
    ]
    # Side by side along the batch, where channels_last stays what it is; a new axis would lose it.
    return torch.cat(parts).view(len(weight), *parts[0].shape)


def _check_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stack: int | None, groups: int) -> None:
    """Raises unless the shapes fit; the mask is looked at elsewhere."""
    for name, value in (("x", x), ("weight", weight)):
        if value.dim() != 4 and (value.dim() != 5 or value.shape[0] != stack):
            more = "" if stack is None else f", or 5 with {stack} first as in the mask"
            raise ValueError(f"{name} must have 4 dimensions{more}, got shape {list(value.shape)}")
    if groups < 1 or x.shape[-3] != weight.shape[-3] * groups or weight.shape[-4] % groups:
        shapes = f"{list(x.shape)}, {list(weight.shape)} and groups={groups}"
        raise ValueError(f"the channels of x and weight do not fit, got {shapes}")
    if bias is not None and bias.shape != weight.shape[:-3]:
        raise ValueError(f"bias must be {list(weight.shape[:-3])}, got shape {list(bias.shape)}")


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    z, mask = inputs
    # A gradient for z alone needs the mask only: the feature map can then be freed.
    ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    z, mask = ctx.saved_tensors
    need_z, need_mask = ctx.needs_input_grad
    source = grad if z is None else z
    grad_z, grad_mask = torch.ops.bdprune.channel_scale_backward(grad, source, mask, need_z, need_mask)
    return grad_z if need_z else None, grad_mask if need_mask else None


def _fake(z: Tensor, mask: Tensor) -> Tensor:
    return empty_like_map(z, mask.dim() == 2)


def _fake_backward(grad: Tensor, z: Tensor, mask: Tensor, need_z: bool, need_mask: bool) -> tuple[Tensor, Tensor]:
    grad_z = empty_like_map(z, mask.dim() == 2) if need_z else z.new_empty(0)
    return grad_z, mask.new_empty(mask.shape if need_mask else (0,))


if _backend.HAS_OPS:
    torch.library.register_fake("bdprune::channel_scale", _fake)
    torch.library.register_fake("bdprune::channel_scale_backward", _fake_backward)
    torch.library.register_autograd("bdprune::channel_scale", _backward, setup_context=_setup_context)
