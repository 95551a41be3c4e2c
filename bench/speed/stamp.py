"""Stamping many triggers onto images: one forward and backward, as in one step of trigger inversion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bdprune.ops import stamp
from bench.speed.benchmark import Benchmark, Variant, Work, compiled, relative_error
from bench.speed.plan import Plan

Stamp = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]
"""Images ``[M, C, h, w]``, masks ``[H, 1, h, w]`` or None, patterns ``[H, C, h, w]``, picks ``[H, N]``; the result is
``[H, N, C, h, w]``."""

_COLOURS = 3


@dataclass(frozen=True)
class Case:
    """Sizes of one benchmark: clean images, side of an image, triggers, images of each trigger; layout and kind."""

    clean: int
    side: int
    triggers: int
    count: int
    channels_last: bool = True
    additive: bool = False

    def __str__(self) -> str:
        kind = "additive, " if self.additive else ""
        layout = "channels_last" if self.channels_last else "NCHW"
        return f"{kind}{self.triggers} triggers, {self.count} images of {self.side}x{self.side} each, {layout}"


CASES = (
    Case(500, 32, 10, 16),
    Case(500, 32, 10, 64),
    Case(500, 32, 43, 16),
    Case(64, 224, 8, 8),
    Case(500, 32, 43, 16, channels_last=False),
    Case(500, 32, 43, 16, additive=True),
)
_QUICK = (Case(5, 8, 2, 3), Case(5, 8, 2, 3, channels_last=False), Case(5, 8, 2, 3, additive=True))


def benchmarks(plan: Plan) -> list[Benchmark]:
    """CIFAR-10, GTSRB and ImageNet: their image sizes, with about as many triggers as a step has."""
    return [stamp_benchmark(plan, case) for case in (_QUICK if plan.quick else CASES)]


def stamp_benchmark(plan: Plan, case: Case) -> Benchmark:
    """One case.

    The lower bound of the forward reads the picked images and writes the stamped ones; that of the backward reads both
    their gradient and the picked images. An image that several triggers pick counts once.
    """
    inputs, grad = _inputs(plan, case)
    images, masks, patterns, picks = inputs

    @cache
    def truth() -> tuple[Tensor, ...]:
        wide = [None if one is None else one.double() for one in (images, masks, patterns)]
        return both_directions(broadcast, wide[0], wide[1], wide[2], picks, grad.double())  # type: ignore[arg-type]

    eager: dict[str, Stamp] = {"broadcast": broadcast, "flat images": flat}
    if case.additive:
        eager["hand-written backward"] = _AddFlat.apply
    else:
        eager |= {"torch.lerp": lerp, "torch.addcmul": addcmul, "hand-written backward": _BlendFlat.apply}
    run = partial(both_directions, images=images, masks=masks, patterns=patterns, picks=picks, grad=grad)
    variants = (
        Variant("one trigger after another", "author", partial(run, one_by_one)),
        *(Variant(name, "eager", partial(run, call)) for name, call in eager.items()),
        *compiled(plan.device, "flat images", flat, run),
        Variant("bdprune.ops.stamp", "ours", partial(run, stamp)),
    )
    picked = len(picks.unique()) * images[0].nbytes
    triggers = patterns.nbytes + (0 if masks is None else masks.nbytes)
    work = (Work(picked + triggers + grad.nbytes), Work(picked + 2 * triggers + grad.nbytes))
    name = "largest relative error of a stamped image or a gradient"
    return Benchmark(
        "Stamped images",
        str(case),
        variants,
        work,
        lambda found: relative_error(found, truth()),
        name,
        seconds=plan.seconds,
    )


def both_directions(
    call: Stamp, images: Tensor, masks: Tensor | None, patterns: Tensor, picks: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """The stamped images, and the gradients of masks and patterns for the gradient ``grad`` of the stamped images."""
    leaves = [None if one is None else one.detach().requires_grad_() for one in (masks, patterns)]
    stamped = call(images, leaves[0], leaves[1], picks)  # type: ignore[arg-type]
    needed = [one for one in leaves if one is not None]
    return (stamped.detach(), *torch.autograd.grad(stamped, needed, grad))


def _inputs(plan: Plan, case: Case) -> tuple[tuple[Tensor, Tensor | None, Tensor, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        values = torch.rand(*shape, generator=generator).to(plan.device)
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        return values.contiguous(memory_format=layout)

    side, triggers, count = case.side, case.triggers, case.count
    images = drawn(case.clean, _COLOURS, side, side)
    masks = None if case.additive else drawn(triggers, 1, side, side)
    patterns = drawn(triggers, _COLOURS, side, side)
    picks = torch.randint(case.clean, (triggers, count), generator=generator).to(plan.device)
    grad = drawn(triggers * count, _COLOURS, side, side).unflatten(0, (triggers, count))
    return (images, masks, 2 * patterns - 1 if case.additive else patterns, picks), grad


def one_by_one(images: Tensor, masks: Tensor | None, patterns: Tensor, picks: Tensor) -> Tensor:
    """The formula of Neural Cleanse for one target label after the other."""
    if masks is None:
        stamped = [(images[some] + pattern).clamp(0, 1) for pattern, some in zip(patterns, picks, strict=True)]
    else:
        triggers = zip(masks, patterns, picks, strict=True)
        stamped = [(1 - mask) * images[some] + mask * pattern for mask, pattern, some in triggers]
    return torch.stack(stamped)


def broadcast(images: Tensor, masks: Tensor | None, patterns: Tensor, picks: Tensor) -> Tensor:
    """The formula for all triggers at once."""
    given, colours = images[picks], patterns.unsqueeze(1)
    if masks is None:
        return (given + colours).clamp(0, 1)
    opacity = masks.unsqueeze(1)
    return given * (1 - opacity) + opacity * colours


def lerp(images: Tensor, masks: Tensor | None, patterns: Tensor, picks: Tensor) -> Tensor:
    """``torch.lerp``, of masks only."""
    assert masks is not None
    return torch.lerp(images[picks], patterns.unsqueeze(1), masks.unsqueeze(1))


def addcmul(images: Tensor, masks: Tensor | None, patterns: Tensor, picks: Tensor) -> Tensor:
    """One pass over the images after the product of mask and pattern, of masks only."""
    assert masks is not None
    return torch.addcmul((masks * patterns).unsqueeze(1), images[picks], (1 - masks).unsqueeze(1))


def flat(images: Tensor, masks: Tensor | None, patterns: Tensor, picks: Tensor) -> Tensor:
    """Images as flat vectors in the order of their memory, so that no inner loop runs over three channels."""
    rows, order = _as_rows(images), _is_channels_last(images)
    given, colours = rows[picks], _as_rows(patterns, order).unsqueeze(1)
    if masks is None:
        return _as_images((given + colours).clamp(0, 1), images)
    opacity = _as_rows(masks.expand_as(patterns), order)
    return _as_images(torch.addcmul(opacity.unsqueeze(1) * colours, given, (1 - opacity).unsqueeze(1)), images)


class _BlendFlat(torch.autograd.Function):
    """``flat`` with masks, and a backward with as few passes as we found in eager PyTorch."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, masks: Tensor, patterns: Tensor, picks: Tensor) -> Tensor:
        order = _is_channels_last(images)
        given = _as_rows(images)[picks]
        opacity, colours = _as_rows(masks.expand_as(patterns), order), _as_rows(patterns, order)
        ctx.save_for_backward(given, opacity, colours)
        ctx.images = images
        kept = (1 - opacity).unsqueeze(1)
        return _as_images(torch.addcmul((opacity * colours).unsqueeze(1), given, kept), images)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, None]:
        given, opacity, colours = ctx.saved_tensors
        images, order = ctx.images, _is_channels_last(ctx.images)
        grad = _as_rows(grads[0].flatten(0, 1), order).view(given.shape)
        total = grad.sum(1)
        dots = (colours * total).sub_((grad * given).sum(1))
        grad_masks = _as_images(dots, images).sum(1, keepdim=True)
        return None, grad_masks, _as_images(opacity * total, images), None


class _AddFlat(torch.autograd.Function):
    """The same for additive triggers."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, masks: None, patterns: Tensor, picks: Tensor) -> Tensor:
        total = _as_rows(images)[picks]
        total += _as_rows(patterns, _is_channels_last(images)).unsqueeze(1)
        stamped = total.clamp(0, 1)
        ctx.save_for_backward(stamped == total)
        ctx.images = images
        return _as_images(stamped, images)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, None]:
        (inside,) = ctx.saved_tensors
        grad = _as_rows(grads[0].flatten(0, 1), _is_channels_last(ctx.images)).view(inside.shape)
        return None, None, _as_images((grad * inside).sum(1), ctx.images), None


def _is_channels_last(images: Tensor) -> bool:
    return not images.is_contiguous()


def _as_rows(images: Tensor, channels_last: bool | None = None) -> Tensor:
    """Images ``[K, C, h, w]`` as ``[K, C * h * w]``, in the order of their memory or in a given one."""
    channels_last = _is_channels_last(images) if channels_last is None else channels_last
    return (images.permute(0, 2, 3, 1) if channels_last else images).flatten(1)


def _as_images(rows: Tensor, like: Tensor) -> Tensor:
    """Rows ``[*, C * h * w]`` as ``[*, C, h, w]``, in the order of ``like``."""
    channels, height, width = like.shape[1:]
    if _is_channels_last(like):
        return rows.unflatten(-1, (height, width, channels)).movedim(-1, -3)
    return rows.unflatten(-1, (channels, height, width))
