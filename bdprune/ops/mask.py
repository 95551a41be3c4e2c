"""Masks over channels: a fused multiply with its backward, and the masked convolution built on it.

Both take a stack of G models, or G masks of one model, as their leading axis.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from bdprune.ops import _backend, _masked_winograd, _stacked_conv, conv_path, reference
from bdprune.ops._check import check_feature_map, check_floating, check_mask, empty_like_map
from bdprune.ops.winograd import fits, pays, takes, winograd_conv2d


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
    winograd: bool = False,
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
        winograd: by :func:`bdprune.ops.winograd_conv2d` where that can do it and pays, with its precision and its
            layout of the output. A :class:`torch.overrides.TorchFunctionMode` may take over the call, and ask for it.

    Returns:
        ``[N, O, H', W']``, or ``[G, N, O, H', W']``: on the CPU the same bits as G calls, but for a shared weight,
        where one convolution runs over all batches; on a GPU up to rounding, since :mod:`bdprune.ops.conv_path`
        chooses what runs. Gradients flow to x and mask, and to weight and bias if they ask.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not fit.

    Source: the masks of Wu and Wang, Adversarial Neuron Pruning, NeurIPS 2021, and of Li et al., Reconstructive Neuron
    Pruning, ICML 2023, eq. 2.

    >>> x, weight = torch.ones(1, 1, 2, 2), torch.ones(2, 1, 2, 2)
    >>> masked_conv2d(x, weight, torch.tensor([1.0, 0.25])).flatten()
    tensor([4., 1.])
    """
    settings = (stride, padding, dilation, groups)
    if has_torch_function((x, weight, mask)):
        given = (x, weight, mask, bias, *settings)
        taken_over: Tensor = handle_torch_function(masked_conv2d, (x, weight, mask), *given, winograd=winograd)
        return taken_over
    check_floating("x", x)
    check_floating("weight", weight)
    check_floating("mask", mask)
    stack = mask.shape[0] if mask.dim() == 2 else None
    _check_conv(x, weight, bias, stack, groups)
    check_mask(mask, weight.shape[-4], x.device, stack)
    if winograd and _winograd_runs(x, weight, bias, settings):
        return _by_winograd(x, weight, mask, bias)
    return _conv(x, weight, mask, bias, settings)


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
    return _conv(x, weight, None, bias, (stride, padding, dilation, groups))


_Settings = tuple[int | tuple[int, int], int | tuple[int, int] | str, int | tuple[int, int], int]
_Convolution = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _winograd_runs(x: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings) -> bool:
    able = fits(weight, *settings) and takes(x, weight, bias) and not torch.is_autocast_enabled("cpu")
    return able and 0 not in x.shape and pays(x, weight)


def _by_winograd(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """In one op where there is one mask and it alone learns."""
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    if mask.dim() == 1 and not (learns and torch.is_grad_enabled()):
        return _masked_winograd.run(x, weight, mask, bias)
    return _by_library(winograd_conv2d, x, weight, mask, bias)


def _conv(x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, settings: _Settings) -> Tensor:
    """The masked convolution by the way that is chosen where there are several."""
    setting = _stacked_conv.setting_of(weight, *settings) if _stacked_conv.takes(x) else None
    if setting is None:
        return _by_library(partial(_conv2d, settings), x, weight, mask, bias)
    ways = _ways(setting, settings, x, weight, mask)
    return ways[conv_path.choose(ways, (x, weight, mask, bias), setting)](x, weight, mask, bias)


def _ways(
    setting: _stacked_conv.Setting, settings: _Settings, x: Tensor, weight: Tensor, mask: Tensor | None
) -> dict[str, conv_path.Run]:
    """What can run it, the safest guess first: our kernel for a stack, the library where it has one convolution."""
    library = partial(_by_library, partial(_conv2d, settings))
    if x.dim() == 4 and weight.dim() == 4 and mask is not None and mask.dim() == 2:
        return {"library": library}  # one convolution is all there is to do
    kernel = partial(_stacked_conv.run, setting=setting)
    if weight.dim() == 4 or len(weight) == 1:
        return {"library": library, "kernel": kernel}
    return {"kernel": kernel, "library": library, "grouped": partial(_grouped, settings)}


def _by_library(conv: _Convolution, x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """Convolutions of one model, as many as there are weights, and the fused mask."""
    if weight.dim() == 5:
        z = _one_by_one(conv, x, weight, bias)
    else:
        z = conv(x if x.dim() == 4 else x.flatten(0, 1), weight, bias)
        if mask is not None and mask.dim() == 2:
            z = z.expand(len(mask), *z.shape) if x.dim() == 4 else z.view(*x.shape[:2], *z.shape[1:])
    return z if mask is None else channel_scale(z, mask)


def _conv2d(settings: _Settings, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    stride, padding, dilation, groups = settings
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _one_by_one(conv: _Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    batches = x.unbind() if x.dim() == 5 else [x] * len(weight)
    biases = [None] * len(weight) if bias is None else bias.unbind()
    parts = [conv(*one) for one in zip(batches, weight.unbind(), biases, strict=True)]
    # Side by side along the batch, where channels_last stays what it is; a new axis would lose it.
    return torch.cat(parts).view(len(weight), *parts[0].shape)


def _grouped(settings: _Settings, x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """All models side by side along the channels of one convolution; one batch for all needs no groups for that."""
    stack, groups = len(weight), settings[3]
    flat_bias = None if bias is None else bias.flatten()
    if x.dim() == 4 and groups == 1:
        wide, together = x, 1
    else:
        batches = x.expand(stack, *x.shape) if x.dim() == 4 else x
        wide, together = batches.transpose(0, 1).flatten(1, 2), stack * groups
    z = _conv2d((*settings[:3], together), wide, weight.flatten(0, 1), flat_bias)
    z = z.unflatten(1, (stack, -1)).transpose(0, 1)
    return z if mask is None else channel_scale(z, mask)


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
