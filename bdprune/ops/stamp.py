"""Stamps many candidate triggers onto images: a fused blend with its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from bdprune.ops import reference
from bdprune.ops._check import check_feature_map, check_floating, check_same_device


def stamp(images: Tensor, masks: Tensor | None, patterns: Tensor, picks: Tensor | None = None) -> Tensor:
    """Stamps H triggers onto images: ``(1 - masks) * images + masks * patterns``, or ``clip(images + patterns)``.

    Args:
        images: ``[M, C, h, w]`` in [0, 1]; they get no gradient.
        masks: ``[H, 1, h, w]`` in [0, 1], the opacity of each trigger at every pixel. None for additive triggers, whose
            sum with an image is clipped to [0, 1].
        patterns: ``[H, C, h, w]``, the colours of each trigger, or the change of each colour.
        picks: ``[H, N]`` int64, the images that each trigger is stamped on; None stamps each on all M images.

    Returns:
        ``[H, N, C, h, w]``, in the dtype of the images and, seen as a map ``[H * N, C, h, w]``, in their layout.
        Differentiable once in masks and patterns. Their gradients are sums over the N images in a fixed order, so their
        bits do not depend on the number of threads. Where a sum is clipped, its gradient is 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: the shapes or devices do not fit.
        IndexError: ``picks`` names an image that is not there.

    >>> stamp(torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.5, 0.0]]]]), torch.ones(1, 1, 1, 2)).flatten()
    tensor([0.5000, 0.0000])
    """
    _check(images, masks, patterns, picks)
    return reference.stamp(images, masks, patterns, picks)


def _check(images: Tensor, masks: Tensor | None, patterns: Tensor, picks: Tensor | None) -> None:
    check_feature_map("images", images)
    for name, value in (("patterns", patterns), ("masks", masks)):
        if value is not None:
            check_floating(name, value)
            check_same_device(name, value, images.device)
    if images.dim() != 4:
        raise ValueError(f"images must be [M, C, h, w], got shape {list(images.shape)}")
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
