"""The masked convolution: filters that fade with their mask."""

from __future__ import annotations

from typing import TypedDict, Unpack

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from bdprune.ops._check import check_floating, check_mask
from bdprune.ops.conv_variants import check_conv
from bdprune.ops.stacked_conv2d import convolve


class Geometry(TypedDict, total=False):
    """The keyword arguments of :func:`torch.nn.functional.conv2d` that say where a filter goes."""

    stride: int | tuple[int, int]
    padding: int | tuple[int, int] | str
    dilation: int | tuple[int, int]
    groups: int


def masked_conv2d(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None, **geometry: Unpack[Geometry]
) -> Tensor:
    """``mask[c] * (conv2d(x, weight)[:, c] + bias[c])``: a convolution whose filters fade with their mask.

    The mask acts on the output, not on the weight: that is the same function, but its gradient then needs no gradient
    of the weight. So with a frozen weight a backward pass runs two convolutions instead of three. A mask ``[G, O]``
    makes it a stack: of G models, each with a weight of its own, or of G masks on one weight. Inputs are one batch for
    each, or one batch for all.

    Args:
        x: ``[N, I, H, W]``, or ``[G, N, I, H, W]`` in a stack.
        weight: ``[O, I / groups, kh, kw]``, or ``[G, O, I / groups, kh, kw]`` in a stack.
        mask: ``[O]``, or ``[G, O]``.
        bias: ``[O]``, ``[G, O]`` with such a weight, or None.
        **geometry: ``stride``, ``padding``, ``dilation`` and ``groups`` as in :func:`torch.nn.functional.conv2d`.

    Returns:
        ``[N, O, H', W']``, or ``[G, N, O, H', W']``: on the CPU the same bits as G calls, but for a shared weight,
        where one convolution runs over all batches; on a GPU up to rounding, since
        :mod:`bdprune.ops.conv_variants` chooses what runs. A :class:`torch.overrides.TorchFunctionMode` may take over
        the call. Gradients flow to x and mask, and to weight and bias if they ask.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not fit.

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
    """Raises unless they are operands of a masked convolution."""
    check_floating("x", x)
    check_floating("weight", weight)
    check_floating("mask", mask)
    stack = mask.shape[0] if mask.dim() == 2 else None
    check_conv(x, weight, bias, stack, groups)
    check_mask(mask, weight.shape[-4], x.device, stack)
