"""3x3 convolutions with fewer multiplications, and the rule for using them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bdprune.ops import _backend, reference
from bdprune.ops._check import check_floating, check_same_device

_TILE = 4  # pixels on a tile's side
_LEAST_CHANNELS = 16
_LEAST_COVER = 0.6  # share of the tiles' pixels that lie in the map
_TILES_PER_CHANNEL = 1 / 8


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``conv2d(x, weight, bias, stride=1, padding=1)`` by Winograd's F(4x4, 3x3), with 36 products instead of 144.

    Args:
        x: ``[N, I, H, W]``; copied first unless it is channels_last.
        weight: ``[O, I, 3, 3]``, any strides.
        bias: ``[O]`` or None.

    Returns:
        ``[N, O, H, W]`` in channels_last, differentiable once in all three. The bits do not depend on the number of
        threads. The compiled kernel takes float32 on the CPU; otherwise this is ``conv2d``.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes, dtypes or devices do not match.

    Precision: on random maps of the sizes in ResNet-18, the root mean square error of output and gradients is about
    twice that of a direct float32 convolution in channels_last; tests allow four times. The gradient of ``weight`` is
    summed in blocks, so over large maps its error may be smaller. A NaN or Inf makes all outputs NaN or Inf in the 4x4
    tiles whose 6x6 inputs contain it; an Inf may become a NaN.

    Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.
    """
    _check(x, weight, bias)
    if not takes(x, weight, bias):
        return reference.winograd_conv2d(x, weight, bias)
    out: Tensor = torch.ops.bdprune.winograd_conv2d(x, weight, bias)
    return out


def winograd_applies(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    """Whether the compiled kernel supports this convolution: 3x3, stride, padding and dilation 1, one group, and
    tensors that it takes.

    Takes the arguments of ``conv2d``.
    """
    ones = all(value in (1, (1, 1), [1, 1]) for value in (stride, dilation))
    fits = weight.shape[-2:] == (3, 3) and ones and padding in (1, (1, 1), [1, 1], "same") and groups == 1
    return fits and takes(x, weight, bias)


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the compiled kernel runs on these tensors, whose shapes match."""
    given = [value for value in (x, weight, bias) if value is not None]
    return _backend.HAS_OPS and all(value.device.type == "cpu" and value.dtype == torch.float32 for value in given)


def winograd_is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether ``winograd_conv2d`` is faster than a direct convolution of these shapes.

    It uses a rule and not a trial, so that repeated runs give the same bits. The rule was fitted to times of both, with
    and without gradients, of 3 to 512 channels on maps of 2x2 to 32x32 pixels (``bench/winograd_rule.py`` measures them
    again). The transforms are too expensive if there are few channels, if tiles extend beyond the edge of the map, or
    if the filters, transformed once, apply to too few tiles. Without AVX-512, no rule was better than always using it.

    Args:
        x: ``[N, I, H, W]``; without the stack axis, as is the weight.
        weight: ``[O, I, 3, 3]``.
    """
    if _backend.cpu_features() != "avx512":
        return True
    samples, channels, height, width = x.shape[-4:]
    tiles = samples * -(-height // _TILE) * -(-width // _TILE)
    covered = samples * height * width / (tiles * _TILE * _TILE) if tiles else 0.0
    narrow, wide = sorted((weight.shape[-4], channels))
    return narrow >= _LEAST_CHANNELS and covered >= _LEAST_COVER and tiles >= wide * _TILES_PER_CHANNEL


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        if value is None:
            continue
        check_floating(name, value)
        check_same_device(name, value, x.device)
        if value.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} as x is, got {value.dtype}")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must be [N, I, H, W] with at least one channel and pixel, got shape {list(x.shape)}")
    if weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3) or not len(weight):
        raise ValueError(f"weight must be [O, {x.shape[1]}, 3, 3], got shape {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {list(weight.shape[:1])}, got shape {list(bias.shape)}")


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    need_x, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    grad_x = None if weight is None else torch.ops.bdprune.winograd_conv2d_input_grad(grad, weight)
    grad_weight = None if x is None else torch.ops.bdprune.winograd_conv2d_weight_grad(grad, x)
    return grad_x, grad_weight, grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None


def _new(like: Tensor, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _new(x, x.shape[0], weight.shape[0], *x.shape[2:])


def _fake_input_grad(grad: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    return _new(grad, grad.shape[0], weight.shape[1], *grad.shape[2:])


def _fake_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    return _new(grad, grad.shape[1], x.shape[1], 3, 3)


if _backend.HAS_OPS:
    torch.library.register_fake("bdprune::winograd_conv2d", _fake)
    torch.library.register_fake("bdprune::winograd_conv2d_input_grad", _fake_input_grad)
    torch.library.register_fake("bdprune::winograd_conv2d_weight_grad", _fake_weight_grad)
    torch.library.register_autograd("bdprune::winograd_conv2d", _backward, setup_context=_setup_context)
