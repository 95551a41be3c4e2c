"""Whether a stack of models is faster as one batch or one after another: the tuner's question ``stack``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.model import Model, StackedNetwork, agrees, why_not
from bdprune.ops import Choice, fastest, settled
from bdprune.runtime.graph import WARM_UPS, Captured, Tensors, recorder_for
from bdprune.runtime.precision import Plan, fingerprint

STACK_OR_LOOP = ("stack", "loop")
WORTH = 0.9
"""A stack must take at most this share of the loop's time; a smaller gain may be noise."""

_FEW_MODELS, _FEW_IMAGES = 2, 16  # of the first trial on a CPU: cheap compared with one step of unlearning


def stack_or_loop(models: Sequence[Model], images: Tensor) -> Choice:
    """How steps of ``models`` on ``images`` ``[N, C, H, W]`` run: as one batch, or one model after another.

    On a CPU, two models on a few images are tried first. A stack only saves calls there, so if it is not faster on the
    smallest maps, the loop is taken without a full trial.

    A number of models that is not a power of two uses the answer for the next smaller one.
    """
    few, on_cpu = (models[:_FEW_MODELS], images[:_FEW_IMAGES]), models[0].device.type == "cpu"
    if on_cpu and len(models) > 1:
        # Checked first, because this is the usual case and a loop should not pay for building a stack.
        small = _settled(*few)
        if small is not None and small.winner == "loop":
            return small
    objection = "there is only one model" if len(models) == 1 else why_not(models)
    if objection:
        return no_stack("stack", models[0], f"{len(models)} x {describe(models[0])}", objection)
    if on_cpu:
        small = _tried(*few)
        if small.winner == "loop":
            return small
    return _tried(models, images)


def no_stack(question: str, model: Model, shape: str, reason: str) -> Choice:
    """The loop, without a trial."""
    return Choice(question, "loop", model.device.type, shape, reason=reason)


def power_of_two(models: Sequence[Model]) -> Sequence[Model]:
    """The first models, as many as the next smaller power of two."""
    return models[: 1 << (len(models).bit_length() - 1)]


def describe(model: Model) -> str:
    """Architecture and size, in words that differ for models with other shapes."""
    shapes = [(name, tuple(value.shape)) for name, value in model.network.state_dict().items()]
    count = sum(parameter.numel() for parameter in model.network.parameters())
    return f"{model.arch}, {count:,} parameters ({fingerprint(shapes)})"


def _shape(models: Sequence[Model], images: Tensor) -> str:
    return f"{len(power_of_two(models))} x {describe(models[0])}, batch {list(images.shape)}"


def _settled(models: Sequence[Model], images: Tensor) -> Choice | None:
    return settled("stack", _shape(models, images), models[0].device, STACK_OR_LOOP, "loop")


def _tried(models: Sequence[Model], images: Tensor) -> Choice:
    known, shape = _settled(models, images), _shape(models, images)
    if known is not None and known.winner == "loop":
        return known
    # Other models of this shape may have been stacked while the forward pass of these does not allow it.
    if not agrees(StackedNetwork(models)):
        return no_stack("stack", models[0], shape, "the forward pass does more than call its layers")
    if known is not None:
        return known
    variants = _passes(StackedNetwork(power_of_two(models)), images)
    return fastest("stack", shape, models[0].device, variants, default="loop", worth=WORTH)


def _passes(stacked: StackedNetwork, images: Tensor) -> dict[str, Callable[[], object]]:
    """A forward and a backward pass of all models: as one batch, and one after another."""
    alone = [model.clone().module for model in stacked.models]
    batch = images.to(stacked.models[0].device, memory_format=torch.channels_last)
    recorder = recorder_for(batch.device)
    first = WARM_UPS + 1 if recorder else 1  # repetitions in the first round, to offset the cost of recording

    def variant(modules: Sequence[nn.Module]) -> Callable[[], object]:
        for module in modules:
            Plan().arrange(module.train())
        steps = [Captured(partial(_pass, module), recorder) for module in modules]
        times = itertools.chain([first], itertools.repeat(1))
        return lambda: [step(batch) for _ in range(next(times)) for step in steps]

    return {"stack": variant([stacked]), "loop": variant(alone)}


def _pass(module: nn.Module, images: Tensor) -> Tensors:
    logits = module(images).flatten(0, -2)
    functional.cross_entropy(logits, logits.detach().argmax(1)).backward()
    return (logits.detach(),)
