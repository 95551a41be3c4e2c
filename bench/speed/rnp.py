"""The phases of RNP: unlearning, recovery of the mask, and the sweep over thresholds.

Unlearning and recovery are timed over a few optimiser steps and scaled to the published number, because every step does
the same work. All variants draw the same augmented batches in the same order, so that their results are comparable.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.data import CleanData
from bdprune.loops import RecoverSettings, SweepSettings, UnlearnSettings, recover, sweep, unlearn
from bdprune.model import Model
from bdprune.runtime import Precision, computes_bfloat16, passes
from bench.speed.benchmark import (
    Benchmark,
    Kind,
    Variant,
    Work,
    absolute_error,
    can_compile,
    max_or_nan,
    relative_error,
)
from bench.speed.networks import clean_images, conv_flops, replace_modules, resnet18, weight_bytes
from bench.speed.plan import Plan

IMAGES, BATCH, EPOCHS = 500, 128, 20
"""The published run: 500 images in batches of at most 128, 20 epochs."""

THRESHOLDS = [index * 0.05 for index in range(19)]

# Filters below each threshold: the published trace of a BadNets model up to 0.3 and the paper's Table 8 from 0.7 to
# 0.8. The other numbers are interpolated or guessed.
PRUNED = [12, 14, 18, 21, 24, 28, 32, 33, 34, 35, 36, 38, 39, 40, 41, 75, 178, 200, 220]


def benchmarks(plan: Plan) -> list[Benchmark]:
    """Three benchmarks for each width."""
    found = []
    for width, timed, swept in plan.rnp:
        model = resnet18(width, plan.device)
        data = clean_images(timed, plan.device)
        size = Size(width, timed)
        found += [unlearn_benchmark(plan, model, data, size), recover_benchmark(plan, model, data, size)]
        found.append(sweep_benchmark(plan, model, clean_images(swept, plan.device, 1), width))
    return found


@dataclass(frozen=True)
class Size:
    """Width of the network, and the number of images in all timed steps."""

    width: int
    images: int

    @property
    def steps(self) -> int:
        """Number of timed optimiser steps."""
        return -(-self.images // BATCH)

    @property
    def scale(self) -> float:
        """Whole run divided by the timed part, counted in images: the cost of convolutions is proportional to them."""
        return EPOCHS * IMAGES / self.images

    @property
    def note(self) -> str:
        """The part of a run that is timed."""
        return f"timed over {self.images} of {EPOCHS * IMAGES} images in {self.steps} step(s)"


@dataclass(frozen=True)
class Style:
    """The style of a plain loop.

    Attributes:
        channels_last: memory format of network and images.
        fused: SGD in one kernel.
        compiled: compiles the network with ``torch.compile``.
        frozen: in the recovery, the weights need no gradients. Published code computes them: its optimiser updates the
            masks only, but the backward pass computes every weight's gradient.
        dtype: of all tensors; float64 for the exact result.
    """

    channels_last: bool = False
    fused: bool = False
    compiled: bool = False
    frozen: bool = False
    dtype: torch.dtype = torch.float32
    _kept: list[nn.Module] = field(default_factory=list, compare=False)

    def prepared(self, module: nn.Module) -> tuple[nn.Module, nn.Module]:
        """``module`` in this style, and the module to call. A compiled module is kept and loads the new weights."""
        kind = torch.channels_last if self.channels_last else torch.contiguous_format
        module = cast(nn.Module, module.to(dtype=self.dtype, memory_format=kind))  # type: ignore[call-overload]
        if not self.compiled:
            return module, module
        if not self._kept:
            self._kept.extend([module, cast(nn.Module, torch.compile(module, dynamic=False))])
        self._kept[0].load_state_dict(module.state_dict())
        return self._kept[0], self._kept[1]

    def batch(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` in this style."""
        kind = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.to(self.dtype).contiguous(memory_format=kind)


AUTHOR, TRUTH = Style(), Style(frozen=True, dtype=torch.float64)
EAGER = {
    "channels_last": Style(channels_last=True),
    "fused SGD": Style(fused=True),
    "channels_last, fused SGD": Style(channels_last=True, fused=True),
}
FROZEN = {
    "frozen weights": Style(frozen=True),
    "frozen weights, channels_last": Style(frozen=True, channels_last=True),
    "frozen weights, channels_last, fused SGD": Style(frozen=True, channels_last=True, fused=True),
}


def unlearn_benchmark(plan: Plan, model: Model, data: CleanData, size: Size) -> Benchmark:
    """Gradient ascent over all weights."""
    settings = UnlearnSettings(
        weight_decay=5e-4, max_epochs=1, stop_accuracy=-1.0, stop_on="epoch", small_data=0, retries=0
    )
    start = {name: one.double() for name, one in model.network.named_parameters()}

    def moved(network: nn.Module) -> list[Tensor]:
        parts = [(one.detach().double() - start[name]).flatten() for name, one in network.named_parameters()]
        return [torch.cat(parts)]

    @cache
    def truth() -> list[Tensor]:
        return moved(plain_unlearn(model, data, TRUTH))

    variants = _variants(plan, size, partial(plain_unlearn, model, data), EAGER)
    mine = _ours(
        "bdprune.loops.unlearning", size, data, lambda some, how: unlearn(model, some, settings, 0, how).model.network
    )
    forward = conv_flops(model.network) * size.images
    work = Work(5 * weight_bytes(model.network) * size.steps, 3 * forward)
    return Benchmark(
        f"RNP width {size.width}: unlearning",
        _CASE,
        (*variants, *mine),
        (_scaled(work, size.scale),),
        lambda network: relative_error(moved(network), truth()),
        "largest error of the change of a weight, relative to the largest change",
        seconds=3 * plan.seconds,
        host=True,
    )


def recover_benchmark(plan: Plan, model: Model, data: CleanData, size: Size) -> Benchmark:
    """Descent over the masks alone."""
    settings = RecoverSettings(loss_scale=0.2, epochs=1, small_data=0)

    @cache
    def truth() -> list[Tensor]:
        return plain_recover(model, data, TRUTH)

    variants = _variants(plan, size, partial(plain_recover, model, data), FROZEN)
    mine = _ours(
        "bdprune.loops.recovery",
        size,
        data,
        lambda some, how: list(recover(model, some, settings, 0, how).masks.values()),
    )
    forward = conv_flops(model.network) * size.images
    work = Work(2 * weight_bytes(model.network) * size.steps, 2 * forward)
    return Benchmark(
        f"RNP width {size.width}: recovery",
        _CASE,
        (*variants, *mine),
        (_scaled(work, size.scale),),
        lambda masks: absolute_error(masks, truth()),
        "largest absolute error of a mask",
        seconds=3 * plan.seconds,
        host=True,
    )


def _ours(name: str, size: Size, data: CleanData, run: Callable[[CleanData, Precision], object]) -> tuple[Variant, ...]:
    """``run`` in the default precision, which counts; in plain float32; and in the fastest precision, if it differs.

    The fastest may be bfloat16, which no other variant uses. Its trials run once per process and are not timed.
    """
    note = f"{size.note}; its copies of the model counted as often"
    names: tuple[Precision, ...] = ("winograd", "float32")
    if computes_bfloat16(data.images.device):
        run(CleanData(data.images[:16], data.labels[:16]), "auto")
        names = (*names, "auto")
    more = {"winograd": "; the default", "auto": "; trials not timed"}
    return tuple(
        Variant(f"{name}, {how}", "ours", partial(run, data, how), size.scale, note + more.get(how, ""), how != "auto")
        for how in names
    )


def sweep_benchmark(plan: Plan, model: Model, data: CleanData, width: int) -> Benchmark:
    """Clean accuracy at 19 thresholds. The masks prune as many filters as published, chosen at random."""
    masks = published_masks(model)

    def plain(batch: int, style: Style, copies: bool) -> list[float]:
        return plain_sweep(model, masks, data, batch, style, copies)

    def mine() -> list[float]:
        swept = sweep(model, masks, [data], SweepSettings(THRESHOLDS, 1.0, stop_early=False))
        return [point.clean_accuracy for point in swept.points]

    @cache
    def truth() -> list[float]:
        return plain(128, TRUTH, True)

    last = EAGER["channels_last"]
    calls: dict[str, tuple[Kind, Callable[[], list[float]]]] = {
        "a pruned copy per threshold, batches of 128": ("author", lambda: plain(128, AUTHOR, True)),
        "channels_last copies, batches of 500": ("eager", lambda: plain(500, last, True)),
        "one copy, pruned in place": ("eager", lambda: plain(128, AUTHOR, False)),
        "one channels_last copy, pruned in place": ("eager", lambda: plain(500, last, False)),
    }
    if _compiles(plan, width):
        fast = replace(last, compiled=True, _kept=[])
        calls["torch.compile: one channels_last copy"] = ("compile", lambda: plain(500, fast, False))
    calls["bdprune.loops.sweep"] = ("ours", mine)
    scale, note = IMAGES / len(data), f"timed over {len(data)} of {IMAGES} images, no early stop"
    variants = tuple(Variant(name, kind, call, scale, note) for name, (kind, call) in calls.items())
    flops = conv_flops(model.network) * IMAGES
    return Benchmark(
        f"RNP width {width}: sweep of {len(THRESHOLDS)} thresholds",
        f"{IMAGES} images",
        variants,
        (Work(weight_bytes(model.network) * len(THRESHOLDS), flops * len(THRESHOLDS)),),
        lambda found: max_or_nan([abs(a - b) for a, b in zip(found, truth(), strict=True)]),
        "largest error of a clean accuracy",
        seconds=3 * plan.seconds,
        host=True,
    )


def plain_unlearn(
    model: Model,
    data: CleanData,
    style: Style,
    lr: float = 0.01,
    epochs: int = 1,
    stop_accuracy: float = -1.0,
    seed: int = 0,
) -> nn.Module:
    """The published loop: train mode, SGD with momentum 0.9 and weight decay 5e-4, on the negative loss.

    Stops after a batch whose accuracy is at or below ``stop_accuracy``.
    """
    module, network = style.prepared(model.clone().module)
    network.train()
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr, 0.9, weight_decay=5e-4, fused=style.fused)
    for images, labels in _published_batches(model, data, style, epochs, seed):
        optimizer.zero_grad()
        logits = network(images)
        (-functional.cross_entropy(logits, labels)).backward()
        optimizer.step()
        if (logits.argmax(1) == labels).double().mean().item() <= stop_accuracy:
            break
    return module.get_submodule("network")


def plain_recover(model: Model, data: CleanData, style: Style, epochs: int = 1, seed: int = 0) -> list[Tensor]:
    """The published loop: a mask in every batch norm, SGD of 0.2 with momentum 0.9 on 0.2 times the loss, clipped."""
    masked = copy.deepcopy(model.module).requires_grad_(not style.frozen)
    replace_modules(masked, nn.BatchNorm2d, MaskedNorm)
    module, network = style.prepared(masked)
    network.train()
    module.train()
    norms = {name: one for name, one in module.get_submodule("network").named_modules() if isinstance(one, MaskedNorm)}
    masks = [norm.mask for norm in norms.values()]
    optimizer = torch.optim.SGD(masks, 0.2, 0.9, fused=style.fused)
    for images, labels in _published_batches(model, data, style, epochs, seed):
        optimizer.zero_grad()
        (0.2 * functional.cross_entropy(network(images), labels)).backward()
        optimizer.step()
        with torch.no_grad():
            for mask in masks:
                mask.clamp_(0, 1)
    # A compiled network is reused, so its masks are copied.
    return [norms[_norm(group.norm)].mask.detach().clone() for group in model.groups]


class MaskedNorm(nn.Module):
    """A batch norm whose scale is multiplied by ``mask`` ``[C]``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        assert isinstance(norm, nn.BatchNorm2d)
        self.norm = norm
        self.mask = nn.Parameter(torch.ones_like(norm.weight))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        scale = norm.weight * self.mask
        return functional.batch_norm(
            x, norm.running_mean, norm.running_var, scale, norm.bias, self.training, norm.momentum or 0.1, norm.eps
        )


@torch.no_grad()
def plain_sweep(
    model: Model, masks: dict[str, Tensor], data: CleanData, batch: int, style: Style, copies: bool
) -> list[float]:
    """Clean accuracy over all images at each threshold; ``copies`` makes a new model for each threshold."""
    accuracies = []
    module, network = style.prepared(copy.deepcopy(model.module))
    for threshold in THRESHOLDS:
        if copies:
            module, network = style.prepared(copy.deepcopy(model.module))
        # Thresholds rise, so filters pruned in place stay pruned.
        for group in model.groups:
            pruned = (masks[group.name] <= threshold).to(model.device)
            module.get_parameter(f"network.{_norm(group.norm)}.weight")[pruned] = 0
        right = 0
        for images, labels in zip(data.images.split(batch), data.labels.split(batch), strict=True):
            logits = network(style.batch(images).to(model.device))
            right += int((logits.argmax(1).cpu() == labels).sum())
        accuracies.append(right / len(data))
    return accuracies


def published_masks(model: Model) -> dict[str, Tensor]:
    """Masks of 1, except as many low ones as published for each threshold; their positions are random."""
    total = sum(group.num_filters for group in model.groups)
    values = torch.ones(total)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    # A narrow network has fewer filters than the paper's 4800, so the same share is pruned.
    counts = [min(total, round(count * total / 4800)) for count in PRUNED]
    for threshold, first, last in zip(THRESHOLDS, [0, *counts], counts, strict=False):
        values[order[first:last]] = max(threshold - 0.01, 0.0)
    parts = values.split([group.num_filters for group in model.groups])
    return {group.name: part for group, part in zip(model.groups, parts, strict=True)}


def _variants(plan: Plan, size: Size, loop: Callable[[Style], object], eager: dict[str, Style]) -> tuple[Variant, ...]:
    """The published loop, each eager style, and the last of them compiled."""
    found = [Variant("published loop, float32, NCHW", "author", lambda: loop(AUTHOR), size.scale, size.note)]
    for key, style in eager.items():
        found.append(Variant(key, "eager", partial(loop, style), size.scale, size.note))
    if _compiles(plan, size.width):
        name, style = list(eager.items())[-1]
        fast = partial(loop, replace(style, compiled=True, _kept=[]))
        found.append(Variant(f"torch.compile: {name}", "compile", fast, size.scale, size.note))
    return tuple(found)


def _compiles(plan: Plan, width: int) -> bool:
    """Only the widest network is compiled, because whole networks take long to compile."""
    return not plan.quick and width == max(one for one, _, _ in plan.rnp) and can_compile(plan.device)


_CASE = f"{IMAGES} images, {EPOCHS} epochs in steps of at most {BATCH}"


def _scaled(work: Work, scale: float) -> Work:
    return replace(work, bytes=work.bytes * scale, flops=work.flops * scale)


def _published_batches(
    model: Model, data: CleanData, style: Style, epochs: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for batches in passes(data, epochs, BATCH, 4, generator, model.device):
        for images, labels in batches:
            yield style.batch(images), labels


def _norm(norm: object) -> str:
    """Name of a group's norm; in a ResNet-18 every convolution has one."""
    name = getattr(norm, "name", None)
    assert isinstance(name, str)
    return name
