"""Number format and memory layout for training a network: plain float32, or the fastest on this machine.

Also the state of torch that every result of this package assumes.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bdprune.errors import OptionError
from bdprune.model import StackedNetwork
from bdprune.ops import fastest
from bdprune.runtime.winograd import WinogradConvs, has_winograd_convs

Precision = Literal["winograd", "float32", "bfloat16", "auto"]
PRECISIONS: tuple[Precision, ...] = ("winograd", "float32", "bfloat16", "auto")
DEFAULT: Precision = "winograd"

_IMAGES = 16  # images of one trial: enough to occupy the convs, few compared with an epoch
_WORTH = 0.8  # bfloat16 must take at most this share of float32's time; a smaller gain may be noise


@dataclass(frozen=True)
class Plan:
    """How a network runs in training. Parameters, gradients, statistics of norms and the loss stay float32.

    Args:
        bfloat16: use bfloat16 autocast: convs and linear layers compute in bfloat16.
        channels_last: memory layout of images and weights.
        winograd: 3x3 convs use Winograd's algorithm if that is faster (:class:`WinogradConvs`). Its rounding errors are
            about twice those of other float32 convs.
    """

    bfloat16: bool = False
    channels_last: bool = True
    winograd: bool = False

    def arrange(self, module: nn.Module) -> None:
        """Converts the parameters of ``module`` to the layout, in place."""
        if isinstance(module, StackedNetwork):
            module.arrange(self.channels_last)
        else:
            module.to(memory_format=self._layout)  # type: ignore[call-overload]

    def logits(self, module: nn.Module, images: Tensor) -> Tensor:
        """Logits of ``module`` for ``images`` ``[N, C, H, W]``: ``[N, K]``, of a stack ``[G, N, K]``, float32."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16), _convs(self.winograd):
            logits: Tensor = module(laid_out(images, self._layout))
        return logits.float() if self.bfloat16 else logits

    @property
    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def convs_of(precision: Precision) -> AbstractContextManager[object]:
    """A context in which the convs of a network in inference run with ``precision``, always in float32.

    Raises:
        OptionError: an unknown precision.
    """
    check_precision(precision)
    return _convs(precision in ("winograd", "auto"))


def _convs(winograd: bool) -> AbstractContextManager[object]:
    return WinogradConvs() if winograd else nullcontext()


def computes_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has bfloat16 arithmetic. Emulation makes a network ten times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """bfloat16 autocast if ``bf16`` is set and the device supports it; otherwise does nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and computes_bfloat16(device))


PLANS = {
    "float32": Plan(),
    "float32-nchw": Plan(channels_last=False),
    "bfloat16": Plan(bfloat16=True),
    "bfloat16-nchw": Plan(bfloat16=True, channels_last=False),
    "winograd": Plan(winograd=True),
}
"""The plans, by their names in the tuner's question ``precision``."""


def plan_for(precision: Precision, module: nn.Module, images: Tensor) -> Plan:
    """The plan for training ``module``.

    ``float32`` is plain PyTorch. ``winograd`` is the same, with 3x3 convs by Winograd's algorithm on a CPU: it is
    faster, its rounding errors are about twice as large, and repeated runs give the same bits. ``bfloat16`` is
    autocast. All of them use channels_last if that is correct (``training_layout``); otherwise, or if no conv can use
    it, ``winograd`` equals ``float32``. ``auto`` asks the tuner for the fastest plan, measured by a forward and a
    backward pass, for every shape of network and images. It takes bfloat16 only if that saves a fifth of the time, and
    does not try it where the machine must emulate it.

    Args:
        module: in its training mode, with its trainable parameters requiring gradients; it does not change.
        images: a batch for the trials, ``[N, C, H, W]``.

    Raises:
        OptionError: an unknown precision.
    """
    check_precision(precision)
    if precision != "auto":
        channels_last = training_layout(module) is torch.channels_last
        winograd = precision == "winograd" and channels_last and has_winograd_convs(module)
        return Plan(precision == "bfloat16", channels_last, winograd)
    return _fastest(module, images[:_IMAGES].to(next(module.parameters()).device))


def check_precision(precision: str) -> None:
    """Raises OptionError for an unknown precision."""
    if precision not in PRECISIONS:
        raise OptionError(f"Unknown precision {precision!r}.", f"Choose one of {', '.join(PRECISIONS)}.")


def fingerprint(*parts: object) -> str:
    """A short hash of the ``repr`` of the parts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def _fastest(module: nn.Module, images: Tensor) -> Plan:
    # Everything that the time depends on, except the kinds of activations.
    parameters = [(name, tuple(value.shape), value.requires_grad) for name, value in module.named_parameters()]
    kind = fingerprint(parameters, [child.training for child in module.modules()])
    shape = f"{type(module).__name__} ({kind}), batch {list(images.shape)}"
    names = [name for name, plan in PLANS.items() if _is_worth_a_trial(plan, module, images.device)]
    runs = {name: _trial(PLANS[name], module, images) for name in names}
    exact = {name: run for name, run in runs.items() if not PLANS[name].bfloat16}
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # dropout draws
        best = fastest("precision", f"{shape}, float32", images.device, exact).winner
        rounded = {name: run for name, run in runs.items() if name == best or name not in exact}
        choice = fastest("precision", shape, images.device, rounded, default=best, worth=_WORTH)
    return PLANS[choice.winner]


def _is_worth_a_trial(plan: Plan, module: nn.Module, device: torch.device) -> bool:
    sound = not plan.channels_last or training_layout(module) is torch.channels_last
    if plan.winograd and not has_winograd_convs(module):
        return False
    return sound and (not plan.bfloat16 or computes_bfloat16(device))


def _trial(plan: Plan, module: nn.Module, images: Tensor) -> Callable[[], object]:
    """A forward and a backward pass of a copy, which the first call creates."""

    @functools.cache
    def arranged() -> nn.Module:
        trial = copy.deepcopy(module)
        plan.arrange(trial)
        return trial

    return lambda: _one_pass(plan, arranged(), images)


def _one_pass(plan: Plan, module: nn.Module, images: Tensor) -> None:
    logits = plan.logits(module, images)
    cross_entropy(logits, logits.detach().argmax(1)).backward()


def training_layout(network: nn.Module) -> torch.memory_format:
    """channels_last, which is faster, if its backward pass is correct.

    In torch 2.13, oneDNN's weight gradient of a strided 1x1 convolution in channels_last writes out of bounds if the
    input has fewer channels than a vector register has floats (uxlfoundation/oneDNN#6035). The process crashes at a
    later allocation, or continues with wrong values. Networks with such a convolution stay contiguous, unless all
    their parameters are frozen, and except on CUDA, which does not use oneDNN.
    """
    on_cuda = any(parameter.device.type == "cuda" for parameter in network.parameters())
    frozen = not any(parameter.requires_grad for parameter in network.parameters())
    if not on_cuda and not frozen and any(map(_is_mangled, network.modules())):
        return torch.contiguous_format
    return torch.channels_last


def laid_out(images: Tensor, layout: torch.memory_format) -> Tensor:
    """Images ``[N, C, H, W]`` in that layout, including their strides.

    With one channel the strides are ambiguous: a grey image in channels_last counts as contiguous and does not change.
    But convolutions read the strides, and would pass channels_last on to the whole network.
    """
    images = images.contiguous(memory_format=layout)
    return images.flatten().view(images.shape) if layout is torch.contiguous_format else images


def _is_mangled(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d) or module.kernel_size != (1, 1) or max(module.stride) == 1:
        return False
    floats = 8 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 16
    return module.in_channels // module.groups < floats


@contextmanager
def plain_torch() -> Iterator[None]:
    """Gradients on, inference mode and autocast off, whatever the caller has set; it is restored afterwards.

    A notebook may have turned gradients off, without which nothing can be unlearned or repaired. Under autocast, the
    figures would be those of another precision than the record names.

    Raises:
        OptionError: the default dtype is not float32, in which networks and images are made.
    """
    default = torch.get_default_dtype()
    if default != torch.float32:
        hint = "Call torch.set_default_dtype(torch.float32) before bdprune."
        raise OptionError(f"The default dtype of torch is {default}, and bdprune computes in float32.", hint)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield
