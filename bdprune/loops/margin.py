"""Activations at a cut through a network that maximise the margin of a label (maximum margin, MM-BD)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdprune.model import Program, State

_STILL = 1e-5  # relative change of the margins of a label below which its plain ascent ends

Tail = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cut:
    """The rest of a network behind one of its values.

    Attributes:
        tail: the value ``[N, ...]`` -> logits ``[N, K]``; differentiable.
        start: the value for some images, ``[N, ...]``.
        lowest: lower limit of the value: 0 behind a ReLU and for images, minus infinity elsewhere.
        highest: upper limit: 1 for images, infinity elsewhere.
        convs: number of convs before it.
    """

    tail: Tail
    start: Tensor
    lowest: float = 0.0
    highest: float = 1.0
    convs: int = 0


def cut_at(module: nn.Module, images: Tensor, depth: float) -> Cut:
    """The first place behind ``depth`` of the convs where a single value is all that the rest of the network reads.

    It is the image itself for ``depth`` 0, and for a network that cannot be traced.

    Args:
        module: images in [0, 1] -> logits, in eval mode, without gradients of weights.
        images: ``[N, C, H, W]``.
        depth: share of the convs, in [0, 1).
    """
    whole = Cut(module, images)
    if depth <= 0:
        return whole
    try:
        program = Program(module)
        with torch.no_grad():
            place = _place(program, module, images[:2], depth)
            state = None if place is None else program.run(images, keep=[place[0]])[1][0]
    except Exception:  # any network may be passed; tracing fails on those that look at their values
        return whole
    if place is None or state is None:
        return whole
    ((step, start),) = state.values.items()

    def tail(value: Tensor) -> Tensor:
        return program.run(value, State.of(place[0], {step: value.clone()}))[0]  # a layer may work in place

    lowest = 0.0 if bool(start.min() >= 0) else -math.inf
    return Cut(tail, start.clone(), lowest, math.inf, place[1])


def _place(program: Program, module: nn.Module, images: Tensor, depth: float) -> tuple[int, int] | None:
    """The position of the cut and the number of convs before it; None if there is no such place."""
    reads = [program.first_read(one.weight) for one in module.modules() if isinstance(one, nn.Conv2d)]
    convs = sorted(one for one in reads if one is not None)
    for state in program.run(images, keep=range(1, len(program)))[1]:
        before = bisect_left(convs, state.position)
        values = list(state.values.values())
        single = len(values) == 1 and isinstance(values[0], Tensor) and values[0].dim() == 4
        if single and max(1.0, depth * len(convs)) <= before < len(convs):
            return state.position, before
    return None


@dataclass(frozen=True)
class MarginSettings:
    """Settings of :func:`largest_margins`.

    Attributes:
        steps: largest number of steps.
        lr: size of the first signed step, in standard deviations of the starting values; it falls along a cosine.
        batch: maximum number of values in one pass.
        signed: take steps with the sign of the gradient. Otherwise a step is ``lr`` times the gradient in every step,
            as in the authors' code, a label stops when its margins change by less than 0.001 %, and ``batch`` is not
            used.
    """

    steps: int = 25
    lr: float = 0.2
    batch: int = 128
    signed: bool = True


def largest_margins(cut: Cut, labels: Tensor, settings: MarginSettings) -> Tensor:
    """The margin ``z_t - max_{j != t} z_j`` of each label and value after ascent from the start, ``[len(labels), N]``.

    Wang et al., IEEE S&P 2024 (MM-BD), in the space of images or behind the first layers.

    Args:
        labels: the labels t to examine, int64.
    """
    count = len(cut.start)
    size = settings.batch if settings.signed else count  # one label at a time, because each stops on its own
    ascend = _signed if settings.signed else _plain
    parts = labels.repeat_interleave(count).to(cut.start.device).split(size)
    starts = torch.arange(len(labels) * count).remainder(count).to(cut.start.device).split(size)
    found = [ascend(cut, cut.start[index], wanted, settings) for index, wanted in zip(starts, parts, strict=True)]
    return torch.cat(found).view(len(labels), count).cpu()


def _signed(cut: Cut, value: Tensor, labels: Tensor, settings: MarginSettings) -> Tensor:
    size = settings.lr * float(cut.start.std())
    for step in range(settings.steps):
        value = value.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(margins(cut.tail(value), labels).sum(), value)
        lr = size * (1 + math.cos(math.pi * step / settings.steps)) / 2
        value = (value.detach() + lr * slope.sign()).clamp(cut.lowest, cut.highest)
    with torch.no_grad():
        return margins(cut.tail(value), labels)


def _plain(cut: Cut, value: Tensor, labels: Tensor, settings: MarginSettings) -> Tensor:
    """The margins before the last step, as in the authors' code; ``value`` may leave its limits and is read clamped."""
    found, last = value.new_full((len(value),), torch.nan), math.inf
    for _ in range(settings.steps):
        value = value.detach().requires_grad_(True)
        found = margins(cut.tail(value.clamp(cut.lowest, cut.highest)), labels)
        (slope,) = torch.autograd.grad(found.sum(), value)
        value = value.detach() + settings.lr * slope
        total = found.sum().item()
        if abs(total - last) < _STILL * abs(last):
            break
        last = total
    return found.detach()


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label minus the largest other logit ``[...]``, from logits ``[..., K]`` and labels ``[...]``."""
    own = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return own - logits.scatter(-1, labels.unsqueeze(-1), -torch.inf).amax(-1)
