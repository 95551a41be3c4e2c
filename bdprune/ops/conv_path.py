"""Which way a masked convolution runs on a GPU, shape by shape: by a short trial whose outcome is kept.

The ways are ``kernel`` (one launch of our own over all models), ``library`` (PyTorch's convolutions, one model after
another, and one fused mask kernel) and ``grouped`` (one convolution of PyTorch's with G times the groups). Ways differ
by rounding, so a machine's choices are kept (:data:`KEPT`) and are the same for every later run.

``BDPRUNE_CONV_PATH`` chooses: ``auto`` (the default: a trial), or the name of a way, which then runs wherever it can.
There is no trial while a CUDA graph is captured, while ``torch.compile`` traces, and where PyTorch is asked for
deterministic algorithms: then the first of the ways runs, unless the shape has been tried before.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bdprune.errors import OptionError
from bdprune.ops._check import is_channels_fastest
from bdprune.ops.trial import ROUNDS, Kept, Timer, device_name, least_seconds, seconds_of

WAYS = ("kernel", "library", "grouped")

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""x, weight, mask and bias of a masked convolution."""

Run = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class ConvChoice:
    """What runs a masked convolution of one shape, and what the trial measured.

    Attributes:
        path: one of :data:`WAYS`.
        device: name of the device.
        shape: what was tried, in words.
        seconds: of one pass by each way, forward and, where a gradient was asked for, backward.
    """

    path: str
    device: str
    shape: str
    seconds: dict[str, float]


def choose(ways: Mapping[str, Run], operands: Operands, setting: object, timer: Timer = seconds_of) -> str:
    """The way that runs these operands.

    Args:
        ways: what can run them, by name; the first is what runs where nothing is known and nothing can be tried.
        operands: the very tensors that are to be convolved; a trial leaves them and their gradients alone.
        setting: stride and so on, whose ``repr`` tells shapes apart.
        timer: seconds of a run on a device; tests bring their own.

    Raises:
        OptionError: BDPRUNE_CONV_PATH is none of the ways.
    """
    first = next(iter(ways))
    if torch.compiler.is_compiling():
        return first
    wanted = _requested()
    if wanted != "auto" or len(ways) == 1:
        return wanted if wanted in ways else first
    device = operands[0].device
    shape, name = _shape_name(operands, setting), device_name(device)
    known = KEPT.known.get(_key(name, shape))
    if known is not None and known.path in ways:
        return known.path
    if _is_fixed(device):
        return first
    try:
        seconds = _tried(ways, operands, device, timer)
    except torch.OutOfMemoryError:
        return first
    choice = ConvChoice(min(seconds, key=seconds.__getitem__), name, shape, seconds)
    KEPT.add(_key(name, shape), choice)
    return choice.path


def _requested() -> str:
    requested = os.environ.get("BDPRUNE_CONV_PATH", "") or "auto"
    if requested != "auto" and requested not in WAYS:
        raise OptionError(f"BDPRUNE_CONV_PATH is {requested!r}.", f"Set it to auto, {', '.join(WAYS)}.")
    return requested


def _is_fixed(device: torch.device) -> bool:
    """Whether a trial would break a capture, or make results depend on it."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return capturing or torch.are_deterministic_algorithms_enabled()


def _tried(ways: Mapping[str, Run], operands: Operands, device: torch.device, timer: Timer) -> dict[str, float]:
    """Least seconds of each way."""
    passes = [functools.partial(_one_pass, run, operands) for run in ways.values()]
    return dict(zip(ways, least_seconds(device, ROUNDS, *passes, timer=timer), strict=True))


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


@functools.cache
def _key(device: str, shape: str) -> str:
    return f"{device}; torch {torch.__version__}; {shape}"


def _is_sound(choice: ConvChoice) -> bool:
    times: Sequence[object] = list(choice.seconds.values())
    texts = isinstance(choice.device, str) and isinstance(choice.shape, str)
    return texts and choice.path in WAYS and all(isinstance(value, float) for value in times)


KEPT = Kept("conv-paths.json", ConvChoice, _is_sound)
"""Every choice that was made on this machine."""
