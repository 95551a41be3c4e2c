"""Masks over channels: a fused multiply with its backward, and the masked convolution built on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bdprune.ops import _backend, reference
from bdprune.ops._check import check_feature_map, check_floating, check_mask, empty_like_map


def channel_scale(z: Tensor, mask: Tensor) -> Tensor:
    """``mask[c] * z[:, c]`` for every channel c.

    Args:
        z: ``[N, C]`` or ``[N, C, *]``, float16, bfloat16, float32 or float64; NCHW and channels_last are read in place.
        mask: ``[C]``, any floating dtype, on z's device.

    Returns:
        The product, in z's dtype and, where z is dense, z's layout. Differentiable once in both arguments; the
        backward is one pass over z and the gradient, and the mask's gradient is summed in float64 in a fixed order, so
        it has the same bits for any number of threads.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: the shapes or devices do not fit.

    >>> channel_scale(torch.ones(1, 2, 1, 2), torch.tensor([0.5, 0.0]))
    tensor([[[[0.5000, 0.5000]],
    <BLANKLINE>
             [[0.0000, 0.0000]]]])
    """
    check_feature_map("z", z)
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

    Args:
        x: ``[N, I, H, W]``.
        weight: ``[O, I / groups, kh, kw]``.
        mask: ``[O]``.
        bias: ``[O]`` or None.
        stride: as in :func:`torch.nn.functional.conv2d`, like the three that follow.
        padding: a number, a pair, ``"same"`` or ``"valid"``.
        dilation: a number or a pair.
        groups: divides I and O.

    Returns:
        ``[N, O, H', W']``. Gradients flow to x and mask, and to weight and bias if they ask.

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
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(f"x and weight must have 4 dimensions, got {list(x.shape)} and {list(weight.shape)}")
    if groups < 1 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        shapes = f"{list(x.shape)}, {list(weight.shape)} and groups={groups}"
        raise ValueError(f"the channels of x and weight do not fit, got {shapes}")
    check_mask(mask, weight.shape[0], x.device)
    return channel_scale(F.conv2d(x, weight, bias, stride, padding, dilation, groups), mask)


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
    return empty_like_map(z)


def _fake_backward(grad: Tensor, z: Tensor, mask: Tensor, need_z: bool, need_mask: bool) -> tuple[Tensor, Tensor]:
    grad_z = empty_like_map(z) if need_z else z.new_empty(0)
    return grad_z, mask.new_empty(mask.shape if need_mask else (0,))


if _backend.HAS_OPS:
    torch.library.register_fake("bdprune::channel_scale", _fake)
    torch.library.register_fake("bdprune::channel_scale_backward", _fake_backward)
    torch.library.register_autograd("bdprune::channel_scale", _backward, setup_context=_setup_context)
