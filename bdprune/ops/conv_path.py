"""Which variant of a masked convolution runs on a GPU, shape by shape: the tuner's question ``conv``.

The variants are ``kernel`` (one launch of our own over all models), ``library`` (PyTorch's convolutions, one model
after another, and one fused mask kernel) and ``grouped`` (one convolution of PyTorch's with G times the groups).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bdprune.ops._check import is_channels_fastest
from bdprune.ops.tuner import Timer, fastest

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""x, weight, mask and bias of a masked convolution."""

Run = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def choose(variants: Mapping[str, Run], operands: Operands, setting: object, timer: Timer | None = None) -> str:
    """The variant that runs these operands.

    Args:
        variants: what can run them, by name; the first is what runs where nothing is known and nothing can be tried.
        operands: the very tensors that are to be convolved; a trial leaves them and their gradients alone.
        setting: stride and so on, whose ``repr`` tells shapes apart.
        timer: as in :func:`bdprune.ops.tuner.fastest`.

    Raises:
        OptionError: BDPRUNE_TUNE names what is unknown.
    """
    if torch.compiler.is_compiling():
        return next(iter(variants))
    passes = {name: functools.partial(_one_pass, run, operands) for name, run in variants.items()}
    return fastest("conv", _shape_name(operands, setting), operands[0].device, passes, timer=timer).winner


def _one_pass(run: Run, operands: Operands) -> None:
    x, weight, mask, bias = (
        None if operand is None else operand.detach().requires_grad_(operand.requires_grad) for operand in operands
    )
    assert x is not None and weight is not None
    y = run(x, weight, mask, bias)
    leaves = [leaf for leaf in (x, weight, mask, bias) if leaf is not None and leaf.requires_grad]
    if y.requires_grad:
        torch.autograd.grad(y, leaves, y.detach())


def _shape_name(operands: Operands, setting: object) -> str:
    """Shapes in words. Batches are told apart by powers of two: a last batch that is smaller needs no trial."""
    x, weight, mask, bias = operands
    sizes = list(x.shape)
    sizes[-4] = 1 << max(sizes[-4] - 1, 0).bit_length()
    masked = "" if mask is None else f", mask {list(mask.shape)}"
    names = zip("xwmb", operands, strict=True)
    grads = "".join(name for name, value in names if value is not None and value.requires_grad)
    grads = grads if torch.is_grad_enabled() and grads else "none"
    kind = str(_dtype_of(x)).removeprefix("torch.") + (", TF32" if torch.backends.cudnn.allow_tf32 else "")
    return (
        f"x {sizes} {kind} {_layout(x)}, weight {list(weight.shape)} {_layout(weight)}{masked}"
        f"{', bias' if bias is not None else ''}, {setting}, gradients {grads}"
    )


def _dtype_of(x: Tensor) -> torch.dtype:
    """What it is convolved in."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _layout(x: Tensor) -> str:
    one = x[0] if x.dim() == 5 and len(x) else x
    return "channels_last" if not one.is_contiguous() and is_channels_fastest(one) else "NCHW"
