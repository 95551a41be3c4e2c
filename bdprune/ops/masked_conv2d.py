"""The masked convolution: scales each filter by its mask."""

from __future__ import annotations

from typing import TypedDict, Unpack

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from bdprune.ops._check import check_floating, check_mask
from bdprune.ops.conv_variants import check_conv
from bdprune.ops.stacked_conv2d import convolve


class Geometry(TypedDict, total=False):
    """The keyword arguments of :func:`torch.nn.functional.conv2d` for the geometry of the convolution."""

    stride: int | tuple[int, int]
    padding: int | tuple[int, int] | str
    dilation: int | tuple[int, int]
    groups: int


def masked_conv2d(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None, **geometry: Unpack[Geometry]
) -> Tensor:
    """``mask[c] * (conv2d(x, weight)[:, c] + bias[c])``: a convolution whose filters are scaled by their masks.

    The mask multiplies the output, not the weight: the function is the same, but its gradient needs no gradient of the
    weight. So with a frozen weight a backward pass runs two convolutions instead of three. A mask ``[G, O]`` makes it a
    stack: G models, each with its own weight, or G masks on one weight. The inputs are one batch for each model, or one
    batch for all.

    Args:
        x: ``[N, I, H, W]``, or ``[G, N, I, H, W]`` in a stack.
        weight: ``[O, I / groups, kh, kw]``, or ``[G, O, I / groups, kh, kw]`` in a stack.
        mask: ``[O]``, or ``[G, O]``.
        bias: ``[O]``, ``[G, O]`` with a stacked weight, or None.
        **geometry: ``stride``, ``padding``, ``dilation`` and ``groups`` as in :func:`torch.nn.functional.conv2d`.

    Returns:
        ``[N, O, H', W']``, or ``[G, N, O, H', W']``. On the CPU the bits are those of G calls, except with a shared
        weight, where one convolution runs over all batches. On a GPU results are equal up to rounding, since
        :mod:`bdprune.ops.conv_variants` chooses the variant. A :class:`torch.overrides.TorchFunctionMode` may intercept
        the call. Gradients flow to x and mask, and to weight and bias if they require one.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not match.

    Source: the masks of Wu and Wang, Adversarial Neuron Pruning, NeurIPS 2021, and of Li et al., Reconstructive Neuron
    Pruning, ICML 2023, eq. 2.

    >>> x, weight = torch.ones(1, 1, 2, 2), torch.ones(2, 1, 2, 2)
    >>> masked_conv2d(x, weight, torch.tensor([1.0, 0.25])).flatten()
    tensor([4., 1.])
    """
    if has_torch_function((x, weight, mask)):
        given = (x, weight, mask, bias)
        taken_over: Tensor = handle_torch_function(masked_conv2d, (x, weight, mask), *given, **geometry)
        return taken_over
    groups = geometry.get("groups", 1)
    check_masked(x, weight, mask, bias, groups)
    settings = (geometry.get("stride", 1), geometry.get("padding", 0), geometry.get("dilation", 1), groups)
    return convolve(x, weight, mask, bias, settings)


def check_masked(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, groups: int) -> None:
    """Raises an error unless they are operands of a masked convolution."""
    check_floating("x", x)
    check_floating("weight", weight)
    check_floating("mask", mask)
    stack = mask.shape[0] if mask.dim() == 2 else None
    check_conv(x, weight, bias, stack, groups)
    check_mask(mask, weight.shape[-4], x.device, stack)
