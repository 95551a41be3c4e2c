"""A mask over the channels of a feature map: a fused multiply with its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bdprune.ops import _backend, reference
from bdprune.ops._check import check_feature_map, check_mask, empty_like_map


def channel_scale(z: Tensor, mask: Tensor) -> Tensor:
    """``mask[c] * z[:, c]`` for every channel c; with a mask ``[G, C]``, ``mask[g, c] * z[g, :, c]``.

    Args:
        z: ``[N, C]`` or ``[N, C, *]``, float16, bfloat16, float32 or float64; reads NCHW and channels_last in place.
            ``[G, N, C]`` or ``[G, N, C, *]`` for a stack.
        mask: ``[C]`` or ``[G, C]``, any floating dtype, on z's device.

    Returns:
        The product, in z's dtype and, if z is dense, in z's layout. Differentiable once in both arguments; the backward
        is one pass over z and the gradient. The mask's gradient is summed in float64 in a fixed order, so its bits do
        not depend on the number of threads, and for a stack they equal those of G calls.

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


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    z, mask = inputs
    # A gradient for z alone needs only the mask, so the feature map can be freed.
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
