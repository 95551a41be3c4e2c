"""Which of two ways to run a stack is the faster one here, by a short trial whose outcome is kept."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.model import Model, StackedNetwork, agrees, why_not
from bdprune.ops.trial import ROUNDS, Kept, device_name, least_seconds
from bdprune.runtime.graph import WARM_UPS, Captured, Tensors, recorder_for
from bdprune.runtime.precision import Plan

Way = Literal["stack", "loop"]

_FEW_MODELS, _FEW_IMAGES = 2, 16  # of the first trial on a CPU: little beside one step of an unlearning
_WORTH = 0.9  # a stack must take at most this share of the loop's time: below, the difference may be noise


@dataclass(frozen=True)
class PathChoice:
    """What a stack runs by, and why.

    Attributes:
        path: ``stack``, all models in the same steps, or ``loop``, one after another.
        device: name of the device.
        shape: architecture, number of models and shape of the batch of the trial.
        stack_seconds: one forward and backward pass of all models in one; None where there was no trial.
        loop_seconds: the same one after another.
        reason: in words, where there was no trial.
    """

    path: Way
    device: str
    shape: str
    stack_seconds: float | None = None
    loop_seconds: float | None = None
    reason: str = ""


def choose(models: Sequence[Model], images: Tensor) -> PathChoice:
    """The path for ``models`` in steps on ``images`` ``[N, C, H, W]``; tried once for every shape, device and torch.

    On a CPU two models on a few images are tried first: a stack saves calls there, and nothing else, so where it does
    not win on the smallest of maps the loop is taken, and no time goes into a trial of the whole.

    A number of models that is no power of two goes by the next smaller one. The outcome is kept (:data:`KEPT`),
    so that other processes need no trial.
    """
    few = (models[:_FEW_MODELS], images[:_FEW_IMAGES])
    if models[0].device.type == "cpu" and len(models) > 1:
        # First of all, because it is nearly always so and a loop should lose no time to a stack that does not run.
        small = KEPT.known.get(_key(models[0], _shape(*few)))
        if small is not None and small.path == "loop":
            return small
    objection = "there is one model" if len(models) == 1 else why_not(models)
    if objection:
        return PathChoice("loop", _device_name(models[0]), f"{len(models)} x {describe(models[0])}", reason=objection)
    if models[0].device.type == "cpu":
        small = _kept_or_tried(*few)
        if small.path == "loop":
            return small
    return _kept_or_tried(models, images)


def _kept_or_tried(models: Sequence[Model], images: Tensor) -> PathChoice:
    some = power_of_two(models)

    def is_sound() -> bool:
        return agrees(StackedNetwork(models))

    def trial() -> Sequence[float] | None:
        return _tried(StackedNetwork(some), images) if is_sound() else None

    return kept_or_tried(models[0], _shape(some, images), trial, is_sound)


def power_of_two(models: Sequence[Model]) -> Sequence[Model]:
    """The first of them, as many as the next smaller power of two."""
    return models[: 1 << (len(models).bit_length() - 1)]


def _shape(models: Sequence[Model], images: Tensor) -> str:
    """Models and batch of a trial, in words."""
    return f"{len(models)} x {describe(models[0])}, batch {list(images.shape)}"


def kept_or_tried(
    model: Model, shape: str, trial: Callable[[], Sequence[float] | None], is_sound: Callable[[], bool]
) -> PathChoice:
    """The choice that is kept for ``shape`` on the device of ``model``, else that of a trial, which is then kept.

    Args:
        shape: what is tried, in words; with the shapes of the model's parameters it tells trials apart.
        trial: least seconds of the stack and of the loop; None where the stack does not say what the models say. That
            says nothing of other models of this shape, so it is not kept.
        is_sound: whether the stack does, for a choice that was kept of other models.
    """
    device, key = _device_name(model), _key(model, shape)
    kept = KEPT.known.get(key)
    if kept is not None and (kept.path == "loop" or is_sound()):
        return kept
    seconds = trial() if kept is None else None
    if seconds is None:
        return PathChoice("loop", device, shape, reason="the forward pass does more than its layers do")
    stack_seconds, loop_seconds = seconds
    path: Way = "stack" if stack_seconds <= _WORTH * loop_seconds else "loop"
    choice = PathChoice(path, device, shape, stack_seconds, loop_seconds)
    KEPT.add(key, choice)
    return choice


def _tried(stacked: StackedNetwork, images: Tensor) -> list[float]:
    """Least seconds of a forward and backward pass of all models: in one, and one after another."""
    models = stacked.models
    stacked.train().arrange(channels_last=True)
    alone = [model.clone().module.train() for model in models]
    for module in alone:
        Plan().arrange(module)
    batch = images.to(models[0].device, memory_format=torch.channels_last)

    recorder = recorder_for(batch.device)
    together, *each = [Captured(partial(_pass, module), recorder) for module in (stacked, *alone)]

    def one_by_one() -> None:
        for step in each:
            step(batch)

    rounds = ROUNDS + (WARM_UPS if recorder else 0)
    return least_seconds(batch.device, rounds, lambda: together(batch), one_by_one)


def _pass(module: nn.Module, images: Tensor) -> Tensors:
    """A forward and a backward pass."""
    logits = module(images).flatten(0, -2)
    functional.cross_entropy(logits, logits.detach().argmax(1)).backward()
    return (logits.detach(),)


def _key(model: Model, shape: str) -> str:
    shapes = [(name, tuple(value.shape)) for name, value in model.network.state_dict().items()]
    what = (_device_name(model), torch.__version__, shape, shapes)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def _device_name(model: Model) -> str:
    name = device_name(model.device)
    return name if model.device.type == "cuda" else f"{name} {platform.machine()}, {torch.get_num_threads()} threads"


def describe(model: Model) -> str:
    """Architecture and size, in words."""
    return f"{model.arch}, {sum(parameter.numel() for parameter in model.network.parameters()):,} parameters"


def _is_sound(choice: PathChoice) -> bool:
    return choice.path in ("stack", "loop")


KEPT = Kept("paths.json", PathChoice, _is_sound)
"""Every choice that was made on this machine."""
