"""Plain PyTorch versions of the ops: the reference for tests of the compiled ops, and the fallback without them.

Written for clarity and float64 accuracy, not for speed. The public functions have already checked the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def filter_matrices(weight: Tensor) -> Tensor:
    """The filters of a weight ``[O, I]``, ``[O, I, kh, kw]`` or ``[G, O, I, kh, kw]`` as ``[count, I, kh * kw]``."""
    if weight.dim() == 2:
        return weight.unsqueeze(-1)
    count = weight.shape[:-3].numel()
    return weight.reshape(count, weight.shape[-3], weight.shape[-2] * weight.shape[-1])


def spectral_norms(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Largest singular value of each filter times ``|scale|``: float64 ``[count]``, NaN for a non-finite filter."""
    matrices = filter_matrices(weight.detach()).double()
    finite = matrices.isfinite().flatten(1).all(1)
    if matrices.numel() == 0:
        norms = matrices.new_zeros(len(matrices))
    else:
        norms = torch.linalg.svdvals(matrices.where(finite[:, None, None], 0.0)).amax(-1)
    norms = norms.where(finite, torch.nan)
    return norms if scale is None else norms * scale.detach().double().reshape(-1).abs()


def filter_spectral_norms(weights: Sequence[Tensor], scales: Sequence[Tensor | None]) -> Tensor:
    """Reference of ``bdprune::filter_spectral_norms``: all norms in one vector, float64 if any weight is float64."""
    wide = any(weight.dtype == torch.float64 for weight in weights)
    parts = [spectral_norms(weight, scale) for weight, scale in zip(weights, scales, strict=True)]
    values = torch.cat(parts) if parts else torch.empty(0)
    return values.to(torch.float64 if wide else torch.float32)


def channel_moments_update_(cross: Tensor, sum: Tensor, norm_sum: Tensor, x: Tensor, shift: Tensor) -> None:
    """Reference of ``bdprune::channel_moments_update_``: adds one batch to the running float64 sums."""
    if cross.dim() == 3:
        for parts in zip(cross, sum, norm_sum, x, shift, strict=True):
            channel_moments_update_(*parts)
        return
    maps = x.detach().double().flatten(2) if x.dim() > 2 else x.detach().double().unsqueeze(-1)  # [N, C, P]
    centred = (maps - shift[:, None]).transpose(0, 1).flatten(1)  # [C, N * P]
    products = centred @ centred.T
    cross += (products + products.T) / 2  # a matrix product may round the two triangles differently
    sum += centred.sum(1)
    if maps.shape[-1]:
        norm_sum += maps.square().mean(-1).sqrt().sum(0)


def channel_scale(z: Tensor, mask: Tensor) -> Tensor:
    """Reference of ``bdprune::channel_scale``: the product in float32 (float64 for float64 z), rounded to z's dtype."""
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return (z.to(dtype) * _per_channel(mask.to(dtype), z)).to(z.dtype)


def channel_scale_backward(
    grad: Tensor, z: Tensor, mask: Tensor, need_z: bool, need_mask: bool
) -> tuple[Tensor, Tensor]:
    """Reference of ``bdprune::channel_scale_backward``; gradients that are not needed are empty."""
    samples = mask.dim() - 1
    dims = [samples, *range(samples + 2, z.dim())]
    grad_z = channel_scale(grad, mask) if need_z else z.new_empty(0)
    grad_mask = (grad.double() * z.double()).sum(dims).to(mask.dtype) if need_mask else mask.new_empty(0)
    return grad_z, grad_mask


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Reference of ``bdprune::winograd_conv2d``; its autograd gives the gradients of the compiled op."""
    return functional.conv2d(x, weight, bias, padding=1)


def _per_channel(mask: Tensor, z: Tensor) -> Tensor:
    """``mask`` [C] or [G, C] in a shape that broadcasts over z [N, C, *] or [G, N, C, *]."""
    ones = (1,) * (z.dim() - mask.dim() - 1)
    return mask.reshape(*mask.shape[:-1], 1, mask.shape[-1], *ones)


def stamp(images: Tensor, masks: Tensor | None, patterns: Tensor, picks: Tensor | None) -> Tensor:
    """Reference of ``bdprune::stamp``, in float32, or float64 for float64 images; autograd gives its gradients."""
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    # Unlike an index in brackets, index_select accepts no negative numbers.
    picked = images if picks is None else images.index_select(0, picks.flatten())
    shape = (1, len(images)) if picks is None else picks.shape
    given = picked.to(dtype).reshape(*shape, *images.shape[1:])
    colours = patterns.unsqueeze(1).to(dtype)
    if masks is None:
        stamped = (given + colours).clamp(0, 1)
    else:
        opacity = masks.unsqueeze(1).to(dtype)
        stamped = given * (1 - opacity) + opacity * colours
    flat = stamped.to(images.dtype).flatten(0, 1)
    if images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous():
        flat = flat.contiguous(memory_format=torch.channels_last)
    return flat.view(stamped.shape)
