"""Stamps many candidate triggers onto images: a fused blend with its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bdprune.ops import _backend, reference
from bdprune.ops._check import check_feature_map, check_floating, check_same_device, empty_like_map, new_maps


def stamp(images: Tensor, masks: Tensor | None, patterns: Tensor, picks: Tensor | None = None) -> Tensor:
    """Stamps H triggers onto images: ``(1 - masks) * images + masks * patterns``, or ``clip(images + patterns)``.

    Args:
        images: ``[M, C, h, w]`` in [0, 1], float16, bfloat16, float32 or float64; reads NCHW and channels_last in
            place. They get no gradient.
        masks: ``[H, 1, h, w]`` in [0, 1], the opacity of each trigger at every pixel. None for additive triggers, whose
            sum with an image is clipped to [0, 1]. Any floating dtype.
        patterns: ``[H, C, h, w]``, the colours of each trigger, or the change of each colour. Any floating dtype.
        picks: ``[H, N]`` int64, the images that each trigger is stamped on; None stamps each on all M images. No copy
            of the picked images is made.

    Returns:
        ``[H, N, C, h, w]``, in the dtype of the images and, seen as a map ``[H * N, C, h, w]``, in their layout.
        Differentiable once in masks and patterns. Their gradients are sums over the N images in a fixed order, so their
        bits do not depend on the number of threads. Where a sum is clipped, its gradient is 0; at exactly 0 and 1, it
        is passed on, as by ``torch.clamp``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: the shapes or devices do not fit, or the images require a gradient.
        IndexError: ``picks`` names an image that is not there. On CUDA such a stamped image is NaN instead, because a
            check would wait for the device.

    >>> stamp(torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.5, 0.0]]]]), torch.ones(1, 1, 1, 2)).flatten()
    tensor([0.5000, 0.0000])
    """
    _check(images, masks, patterns, picks)
    if not _backend.is_native(images):
        return reference.stamp(images, masks, patterns, picks)
    stamped: Tensor = torch.ops.bdprune.stamp(images, masks, patterns, picks)
    return stamped


def _check(images: Tensor, masks: Tensor | None, patterns: Tensor, picks: Tensor | None) -> None:
    check_feature_map("images", images)
    for name, value in (("patterns", patterns), ("masks", masks)):
        if value is not None:
            check_floating(name, value)
            check_same_device(name, value, images.device)
    if images.dim() != 4:
        raise ValueError(f"images must be [M, C, h, w], got shape {list(images.shape)}")
    if images.requires_grad and torch.is_grad_enabled():
        raise ValueError("images must not require a gradient, because stamp has none for them; detach them first")
    if patterns.dim() != 4 or patterns.shape[1:] != images.shape[1:]:
        raise ValueError(f"patterns must be [H, {', '.join(map(str, images.shape[1:]))}], got {list(patterns.shape)}")
    if masks is not None and masks.shape != (len(patterns), 1, *images.shape[2:]):
        wanted = [len(patterns), 1, *images.shape[2:]]
        raise ValueError(f"masks must be {wanted}, got shape {list(masks.shape)}")
    if picks is None:
        return
    if picks.dtype != torch.int64:
        raise TypeError(f"picks must be int64, got {picks.dtype}")
    if picks.dim() != 2 or len(picks) != len(patterns):
        raise ValueError(f"picks must be [{len(patterns)}, N], got shape {list(picks.shape)}")
    check_same_device("picks", picks, images.device)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
    _, need_masks, need_patterns, _ = ctx.needs_input_grad
    grad_masks, grad_patterns = torch.ops.bdprune.stamp_backward(grad, *ctx.saved_tensors, need_masks, need_patterns)
    return None, grad_masks if need_masks else None, grad_patterns if need_patterns else None, None


def _fake(images: Tensor, masks: Tensor | None, patterns: Tensor, picks: Tensor | None) -> Tensor:
    count = len(images) if picks is None else picks.shape[1]
    return new_maps(images, len(patterns), count, *images.shape[1:])


def _fake_backward(
    grad: Tensor,
    images: Tensor,
    masks: Tensor | None,
    patterns: Tensor,
    picks: Tensor | None,
    need_masks: bool,
    need_patterns: bool,
) -> tuple[Tensor, Tensor]:
    grad_masks = images.new_empty(0) if masks is None else masks.new_empty(masks.shape if need_masks else (0,))
    return grad_masks, empty_like_map(patterns) if need_patterns else patterns.new_empty(0)


if _backend.HAS_OPS:
    torch.library.register_fake("bdprune::stamp", _fake)
    torch.library.register_fake("bdprune::stamp_backward", _fake_backward)
    torch.library.register_autograd("bdprune::stamp", _backward, setup_context=_setup_context)
