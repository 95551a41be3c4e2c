"""Winograd's convolution with a mask on its filters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bdprune.ops import _backend
from bdprune.ops.conv_variants import by_library
from bdprune.ops.masked_conv2d import check_masked, masked_conv2d
from bdprune.ops.winograd_conv2d import takes, winograd_conv2d

_ops = torch.ops.bdprune


def winograd_masked_conv2d(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """``masked_conv2d(x, weight, mask, bias, stride=1, padding=1)`` by Winograd's algorithm.

    Args:
        x: ``[N, I, H, W]``, or ``[G, N, I, H, W]`` in a stack.
        weight: ``[O, I, 3, 3]``, or ``[G, O, I, 3, 3]`` in a stack.
        mask: ``[O]``, or ``[G, O]``.
        bias: ``[O]``, ``[G, O]`` with a stacked weight, or None.

    Returns:
        ``[N, O, H, W]``, or ``[G, N, O, H, W]``, in channels_last; one op if only x and one mask require gradients.
        Precision and supported tensors are those of :func:`bdprune.ops.winograd_conv2d`.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not match.
    """
    check_masked(x, weight, mask, bias, 1)
    if weight.shape[-2:] != (3, 3):
        raise ValueError(f"weight must be [O, I, 3, 3] or [G, O, I, 3, 3], got shape {list(weight.shape)}")
    if 0 in x.shape or not takes(x, weight, bias):
        return masked_conv2d(x, weight, mask, bias, padding=1)
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    if mask.dim() == 1 and not (learns and torch.is_grad_enabled()):
        return _fused(x, weight, mask, bias)
    return by_library(winograd_conv2d, x, weight, mask, bias)


def _fused(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """The same in one op, differentiable once in x and mask only.

    The mask multiplies the outputs as they are stored, and in the backward pass the filters as they are transformed, so
    no masked gradient is computed.

    Args:
        x: float32 ``[N, I, H, W]``.
        weight: float32 ``[O, I, 3, 3]``, frozen.
        mask: ``[O]``, any floating dtype.
        bias: float32 ``[O]``, frozen, or None.
    """
    need_z = mask.requires_grad and torch.is_grad_enabled()
    product: Tensor = _ops.winograd_masked_conv2d(x, weight, mask.float(), bias, need_z)[0]
    return product


_Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, bool]


def _setup_context(ctx: Any, inputs: _Inputs, output: tuple[Tensor, Tensor]) -> None:
    _, weight, mask, _, need_z = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, mask, output[1] if need_z else None)


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    weight, mask, z = ctx.saved_tensors
    grad = grad.contiguous(memory_format=torch.channels_last)  # here, so that the two ops do not both copy it
    grad_x = None if weight is None else _ops.winograd_conv2d_input_grad(grad, weight, mask)
    grad_mask = None if z is None else _ops.channel_scale_backward(grad, z, mask, False, True)[1]
    return grad_x, None, grad_mask, None, None


def _fake(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, need_z: bool) -> tuple[Tensor, Tensor]:
    sizes = x.shape[0], len(weight), *x.shape[2:]
    y = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, torch.empty_like(y) if need_z else y.new_empty(0)


if _backend.HAS_OPS:
    torch.library.register_fake("bdprune::winograd_masked_conv2d", _fake)
    torch.library.register_autograd("bdprune::winograd_masked_conv2d", _backward, setup_context=_setup_context)
