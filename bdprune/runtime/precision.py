"""The number format and memory layout that a network trains in: as published, or what this machine runs fastest."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.errors import OptionError
from bdprune.ops.trial import ROUNDS, seconds_of
from bdprune.runtime.layout import laid_out, training_layout
from bdprune.runtime.winograd import WinogradConvs, has_winograd_convs

Precision = Literal["winograd", "float32", "bfloat16", "auto"]
PRECISIONS: tuple[Precision, ...] = ("winograd", "float32", "bfloat16", "auto")
DEFAULT: Precision = "winograd"

_IMAGES = 16  # images of one trial: enough to fill the convs, little beside an epoch
_WORTH = 0.8  # bfloat16 must take at most this share of float32's time: precision is not given away for noise


@dataclass(frozen=True)
class Plan:
    """How a network runs while it trains. Parameters, gradients, statistics of norms and the loss stay float32.

    Args:
        bfloat16: under bfloat16 autocast: convs and linear layers compute in bfloat16.
        channels_last: memory layout of images and weights.
        winograd: 3x3 convs by Winograd's algorithm where that is faster (``training/winograd.py``). It rounds about
            twice as coarsely as float32 convs do otherwise.
    """

    bfloat16: bool = False
    channels_last: bool = True
    winograd: bool = False

    def arrange(self, module: nn.Module) -> None:
        """Lays out the parameters of ``module`` in place."""
        module.to(memory_format=self._layout)  # type: ignore[call-overload]

    def logits(self, module: nn.Module, images: Tensor) -> Tensor:
        """What ``module`` says of ``images`` ``[N, C, H, W]``: ``[N, K]`` float32."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16), _convs(self.winograd):
            logits: Tensor = module(laid_out(images, self._layout))
        return logits.float() if self.bfloat16 else logits

    @property
    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def convs_of(precision: Precision) -> AbstractContextManager[object]:
    """Within it, convs of a network that does not train run as ``precision`` has it: always float32.

    Raises:
        OptionError: an unknown precision.
    """
    check_precision(precision)
    return _convs(precision in ("winograd", "auto"))


def _convs(winograd: bool) -> AbstractContextManager[object]:
    return WinogradConvs() if winograd else nullcontext()


def computes_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has bfloat16 arithmetic: elsewhere it is emulated, and a network runs ten times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """bfloat16 autocast where ``bf16`` asks for it and the device computes in it; elsewhere nothing changes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and computes_bfloat16(device))


PLANS = (
    *(Plan(bfloat16, channels_last) for bfloat16 in (False, True) for channels_last in (True, False)),
    Plan(winograd=True),
)
_measured: dict[Any, Plan] = {}


def plan_for(precision: Precision, module: nn.Module, images: Tensor) -> Plan:
    """The plan to train ``module`` by.

    ``float32`` is what PyTorch computes, and ``winograd`` the same with 3x3 convs by Winograd's algorithm on a CPU: it
    is faster, rounds about twice as coarsely, and gives the same bits run after run. ``bfloat16`` is autocast. All of
    them run in channels_last where that is sound (``training_layout``); where it is not, or there is no conv that could
    run by it, ``winograd`` is ``float32``. ``auto`` times a forward and a backward pass of each plan, once a process
    for every shape of network and images, and takes bfloat16 only where it saves a fifth of the time; it is not tried
    where the machine has to emulate it.

    Args:
        module: in the mode, and asking for the gradients, in which it will train; stays as it is.
        images: some to try it on, ``[N, C, H, W]``.

    Raises:
        OptionError: an unknown precision.
    """
    check_precision(precision)
    if precision != "auto":
        channels_last = training_layout(module) is torch.channels_last
        winograd = precision == "winograd" and channels_last and has_winograd_convs(module)
        return Plan(precision == "bfloat16", channels_last, winograd)
    images = images[:_IMAGES].to(next(module.parameters()).device)
    key = _shape(module, images)
    if key not in _measured:
        _measured[key] = _fastest(module, images)
    return _measured[key]


def check_precision(precision: str) -> None:
    """Raises OptionError for an unknown precision."""
    if precision not in PRECISIONS:
        raise OptionError(f"The precision is {precision!r}.", f"Choose one of {', '.join(PRECISIONS)}.")


def _shape(module: nn.Module, images: Tensor) -> Any:
    """All that a time depends on, but for the kinds of activations."""
    parameters = tuple((name, tuple(value.shape), value.requires_grad) for name, value in module.named_parameters())
    modes = tuple(child.training for child in module.modules())
    return type(module), parameters, modes, tuple(images.shape), images.device, torch.get_num_threads()


def _fastest(module: nn.Module, images: Tensor) -> Plan:
    trials = {plan: copy.deepcopy(module) for plan in PLANS if _is_worth_a_trial(plan, module, images.device)}
    seconds = dict.fromkeys(trials, math.inf)
    for plan, trial in trials.items():
        plan.arrange(trial)
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # dropout draws
        for _ in range(ROUNDS):
            for plan, trial in trials.items():  # in turn, so that a busy machine hurts them alike
                seconds[plan] = min(seconds[plan], _seconds(plan, trial, images))
    exact = min((plan for plan in trials if not plan.bfloat16), key=seconds.__getitem__)
    fastest = min(trials, key=seconds.__getitem__)
    return fastest if seconds[fastest] <= _WORTH * seconds[exact] else exact


def _is_worth_a_trial(plan: Plan, module: nn.Module, device: torch.device) -> bool:
    sound = not plan.channels_last or training_layout(module) is torch.channels_last
    if plan.winograd and not has_winograd_convs(module):
        return False
    return sound and (not plan.bfloat16 or computes_bfloat16(device))


def _seconds(plan: Plan, module: nn.Module, images: Tensor) -> float:
    """Time of one forward and one backward pass."""

    def run() -> None:
        logits = plan.logits(module, images)
        functional.cross_entropy(logits, logits.detach().argmax(1)).backward()

    return seconds_of(run, images.device)
