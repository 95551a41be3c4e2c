"""A stack of models of one architecture: norms, scores, masked convolutions, unlearning, and all of RNP.

A variant that takes too long for all models is timed on one model and scaled; its note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import bdprune
from bdprune.analysis import channel_lipschitz, norm_gain
from bdprune.loops import RecoverSettings, SweepSettings, UnlearnSettings, unlearn, unlearn_stack
from bdprune.model import Model
from bdprune.ops import filter_spectral_norms, masked_conv2d
from bdprune.pipeline import free_memory
from bdprune.runtime import footprint
from bench.speed import rnp
from bench.speed.benchmark import Benchmark, Kind, Variant, Work, can_compile, max_or_nan, relative_error
from bench.speed.filter_spectral_norms import author_loop, batched_svdvals, gram_eigvalsh, read_once, svdvals_gesvda
from bench.speed.masked_conv2d import Problem, both_ways, on_output, on_weights, unmasked
from bench.speed.networks import clean_images, conv_flops, resnet18, weight_bytes
from bench.speed.plan import Plan

NAME = "Stack of models"
STREAMS = 8
_RNP_MODELS = 8  # these fill a GPU, and more would take too long
_WIDE = 32  # pixels across the maps of the first stage


def benchmarks(plan: Plan) -> list[Benchmark]:
    """Norms and scores at the last width, convolutions at each, unlearning at the first, RNP on a GPU."""
    count, width, _ = plan.stack[-1]
    models = siblings(count, width, plan.device)
    found = [norms_benchmark(plan, models, width), scores_benchmark(plan, models, width)]
    # This asks for free device memory, so it runs before the other data exists.
    whole = [rnp_benchmark(plan, models, width)] if plan.device.type == "cuda" or plan.quick else []
    for count, width, images in plan.stack:
        for channels, size in ((width, _WIDE), (4 * width, _WIDE // 4)):
            data = problem(count, images, channels, size, plan.device)
            found.append(conv_benchmark(plan, data, width))
            if plan.device.type == "cuda":
                found.append(with_tf32(found[-1]))
    return [*found, unlearn_benchmark(plan, *plan.stack[0]), *whole]


def siblings(count: int, width: int, device: torch.device) -> list[Model]:
    """A ResNet-18, and copies with scaled weights."""
    first = resnet18(width, device)
    models = [first] + [first.clone() for _ in range(count - 1)]
    with torch.no_grad():
        for index, model in enumerate(models):
            for parameter in model.network.parameters():
                parameter.mul_(1 + 0.01 * index)
    return models


def norms_benchmark(plan: Plan, models: Sequence[Model], width: int) -> Benchmark:
    """Spectral norms of all filters of all models. The lower bound reads every weight once."""
    weights = [[layer for layer in model.network.parameters() if layer.dim() == 4] for model in models]
    everything = [weight.detach() for of_one in weights for weight in of_one]
    first = [weight.detach() for weight in weights[0]]
    host_copy = [weight.cpu() for weight in first]
    one = f"timed over one of {len(models)} models"

    @cache
    def truth() -> list[Tensor]:
        return batched_svdvals([weight.double() for weight in first])

    def error(found: list[Tensor]) -> float:
        pairs = zip(found, truth(), strict=False)
        return max_or_nan([((ours.double() - exact).abs() / exact).max().item() for ours, exact in pairs])

    eager: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
        "svdvals": batched_svdvals,
        "float32 Gram + eigvalsh": gram_eigvalsh,
    }
    if plan.device.type == "cuda":
        eager["svdvals, gesvda driver"] = svdvals_gesvda
    variants = [Variant("one svd per filter", "author", partial(author_loop, first), len(models), one)]
    variants += [Variant(name, "eager", partial(call, first), len(models), one) for name, call in eager.items()]
    variants.append(Variant("bdprune.ops.filter_spectral_norms", "ours", partial(filter_spectral_norms, everything)))
    if plan.device.type == "cuda":
        on_cpu = partial(filter_spectral_norms, host_copy)
        variants.append(Variant("the same op on the CPU", "alternative", on_cpu, len(models), one))
    variants.append(Variant("sum of every weight", "required", partial(read_once, everything), exact=False))
    size = sum(weight.nbytes for weight in everything)
    case = f"{len(models)} x ResNet-18 width {width}, {size / 1e6:.1f} MB"
    what = "largest relative error of a norm of the first model"
    return Benchmark(
        f"{NAME}, spectral norms", case, tuple(variants), (Work(size),), error, what, seconds=plan.seconds / 4
    )


def scores_benchmark(plan: Plan, models: Sequence[Model], width: int) -> Benchmark:
    """Data-free scores. Finding the filter groups happens once per architecture and is not timed."""
    _ = models[0].groups
    one = f"timed over one of {len(models)} models"

    def by(norms: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
        model = models[0]
        found = norms([model.network.get_parameter(f"{group.conv}.weight").detach() for group in model.groups])
        gains = [norm_gain(model.network, group) for group in model.groups]
        return [norm if gain is None else norm * gain for norm, gain in zip(found, gains, strict=True)]

    def ours() -> list[Tensor]:
        return [
            score for scores in bdprune.stack([replace(one) for one in models]).scores() for score in scores.values()
        ]

    def one_by_one() -> list[Tensor]:
        return [score for model in models for score in channel_lipschitz(replace(model)).values()]

    @cache
    def truth() -> list[Tensor]:
        return by(lambda weights: batched_svdvals([weight.double() for weight in weights]))

    variants = (
        Variant("one svd per filter", "author", partial(by, author_loop), len(models), one),
        Variant("svdvals", "eager", partial(by, batched_svdvals), len(models), one),
        Variant("Gram + eigvalsh", "eager", partial(by, gram_eigvalsh), len(models), one),
        Variant("bdprune.stack(models).scores()", "ours", ours),
        Variant("bdprune.analysis.channel_lipschitz, one by one", "ours", one_by_one),
    )
    size = sum(weight_bytes(model.network) for model in models)
    return Benchmark(
        f"{NAME}, data-free scores",
        f"{len(models)} x ResNet-18 width {width}",
        variants,
        (Work(size),),
        lambda found: relative_error(found[: len(truth())], truth()),
        "largest error of a score of the first model, relative to the largest of its layer",
        seconds=plan.seconds / 4,
        host=True,
    )


@dataclass(frozen=True)
class StackProblem:
    """Inputs ``[G, N, C, H, W]``, weights ``[G, C, C, 3, 3]``, masks ``[G, C]`` and gradients of the outputs, stacked;
    and views of the same memory for each model."""

    stacked: Problem
    single: list[Problem]


def problem(count: int, images: int, channels: int, size: int, device: torch.device) -> StackProblem:
    """Random values from a fixed seed; each model's part is in channels_last, as in training."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device)
        return drawn.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(shape)

    x, grad = (random(count, images, channels, size, size) for _ in range(2))
    weight = random(count, channels, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
    mask = torch.rand(count, channels, generator=generator, device=device)
    single = [Problem(x[g].requires_grad_(), weight[g], mask[g].requires_grad_(), grad[g]) for g in range(count)]
    return StackProblem(Problem(x.requires_grad_(), weight, mask.requires_grad_(), grad), single)


def conv_benchmark(plan: Plan, data: StackProblem, width: int) -> Benchmark:
    """One layer of every model: forward pass and gradients of the input and of the mask."""
    count, images, channels, size, _ = data.stacked.x.shape
    variants = [
        Variant("loop, mask times weights", "author", partial(looped, on_weights, data)),
        Variant("loop, mask times output", "eager", partial(looped, on_output, data)),
        Variant("torch.func.vmap", "eager", partial(both_ways, torch.func.vmap(on_output), data.stacked)),
        Variant("one grouped convolution", "eager", partial(both_ways, grouped, data.stacked)),
    ]
    if plan.device.type == "cuda":
        variants.append(Variant(f"loop over {STREAMS} streams", "eager", partial(streamed, data)))
        if can_compile(plan.device) and not plan.quick and size == _WIDE:  # compiling takes seconds
            fast = torch.compile(grouped, dynamic=False)
            variants.append(
                Variant("torch.compile: one grouped convolution", "compile", partial(both_ways, fast, data.stacked))
            )
    variants.append(Variant("bdprune.ops.masked_conv2d", "ours", partial(both_ways, ours, data.stacked)))
    plain = partial(_each, unmasked, data)
    variants.append(Variant("loop, no mask, gradient of the input", "required", plain, exact=False))

    @cache
    def truth() -> Any:
        first = data.single[0]
        x, weight, mask, grad = (one.detach().double() for one in (first.x, first.weight, first.mask, first.grad))
        return both_ways(on_output, Problem(x.requires_grad_(), weight, mask.requires_grad_(), grad))

    def error(found: Any) -> float:
        own = found[0] if isinstance(found, list) else [one[0] for one in found]
        return relative_error([one.detach() for one in own], [one.detach() for one in truth()])

    one = data.stacked
    flops = 2 * 2.0 * one.weight[0].numel() * count * images * size * size
    case = f"{count} x [{images}, {channels}, {size}, {size}], 3x3, channels_last, of ResNet-18 width {width}"
    what = "largest error of output and gradients of the first model, relative to the largest value"
    work = (Work(4 * one.x.nbytes + 2 * one.weight.nbytes, flops),)
    return Benchmark(f"{NAME}, masked convolution", case, tuple(variants), work, error, what, seconds=plan.seconds / 4)


def with_tf32(benchmark: Benchmark) -> Benchmark:
    """The same benchmark with TF32 in every variant."""

    def allowed(call: Callable[[], Any]) -> Any:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
            return call()

    variants = tuple(replace(variant, call=partial(allowed, variant.call)) for variant in benchmark.variants)
    return replace(benchmark, case=f"{benchmark.case}, TF32 in every variant", variants=variants)


def looped(call: Callable[..., Tensor], data: StackProblem) -> list[Any]:
    """One model after another."""
    return [both_ways(call, one) for one in data.single]


def _each(call: Callable[[Problem], Any], data: StackProblem) -> list[Any]:
    return [call(one) for one in data.single]


def grouped(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """All models as groups of one convolution."""
    wide = x.transpose(0, 1).flatten(1, 2)
    z = functional.conv2d(wide, weight.flatten(0, 1), padding=1, groups=len(weight))
    return (z * mask.flatten()[:, None, None]).unflatten(1, mask.shape).transpose(0, 1)


def streamed(data: StackProblem) -> list[Any]:
    """CUDA only: the loop, with models on several streams in turn."""
    current = torch.cuda.current_stream()
    streams = [torch.cuda.Stream() for _ in range(STREAMS)]
    found = []
    for index, one in enumerate(data.single):
        stream = streams[index % STREAMS]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            found.append(both_ways(on_output, one))
    for stream in streams:
        current.wait_stream(stream)
    return found


def ours(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """The op."""
    return masked_conv2d(x, weight, mask, padding=1)


def unlearn_benchmark(plan: Plan, count: int, width: int, images: int) -> Benchmark:
    """One ascent step of every model, including the copies of the models."""
    models = siblings(count, width, plan.device)
    data = clean_images(images, plan.device)
    settings = UnlearnSettings(
        weight_decay=5e-4, max_epochs=1, stop_accuracy=-1.0, stop_on="epoch", small_data=0, retries=0
    )
    bdprune.stack(models).variant(data)  # the trial runs once per machine
    start = [parameter.detach().double() for parameter in models[0].network.parameters()]

    def moved(network: torch.nn.Module) -> list[Tensor]:
        pairs = zip(network.parameters(), start, strict=True)
        return [torch.cat([(one.detach().double() - before).flatten() for one, before in pairs])]

    def networks(outcomes: Sequence[Any]) -> list[torch.nn.Module]:
        return [one.model.network for one in outcomes]

    def plain(style: rnp.Style) -> list[torch.nn.Module]:
        return [rnp.plain_unlearn(model, data, style) for model in models]

    @cache
    def truth() -> list[Tensor]:
        return moved(rnp.plain_unlearn(models[0], data, rnp.TRUTH))

    calls: dict[str, tuple[Kind, Callable[[], list[torch.nn.Module]]]] = {
        "published loop, one model after another": ("author", lambda: plain(rnp.AUTHOR)),
        "channels_last, one model after another": ("eager", lambda: plain(rnp.EAGER["channels_last"])),
        "channels_last, fused SGD, one model after another": (
            "eager",
            lambda: plain(rnp.EAGER["channels_last, fused SGD"]),
        ),
        "bdprune.stack(models).unlearn": ("ours", lambda: networks(bdprune.stack(models).unlearn(data, settings))),
        "ours, all in the same steps": ("ours", lambda: networks(unlearn_stack(models, data, settings))),
        "ours, one after another": ("ours", lambda: networks([unlearn(model, data, settings) for model in models])),
    }
    forward = conv_flops(models[0].network) * images
    work = Work(5 * weight_bytes(models[0].network), 3 * forward)
    return Benchmark(
        f"{NAME}, unlearning",
        f"{len(models)} x ResNet-18 width {width}, one step on {images} images",
        tuple(Variant(name, kind, call) for name, (kind, call) in calls.items()),
        (replace(work, bytes=work.bytes * len(models), flops=work.flops * len(models)),),
        lambda found: relative_error(moved(found[0]), truth()),
        "largest error of the change of a weight of the first model, relative to the largest change",
        seconds=plan.seconds / 4,
        host=True,
    )


def rnp_benchmark(plan: Plan, models: Sequence[Model], width: int) -> Benchmark:
    """All of RNP, per model: unlearning and recovery to the last epoch, and a whole sweep."""
    images, epochs = (8, 1) if plan.quick else (rnp.IMAGES, rnp.EPOCHS)
    data = clean_images(images, plan.device)
    masks = rnp.published_masks(models[0])
    unlearning = UnlearnSettings(
        weight_decay=5e-4, max_epochs=epochs, stop_accuracy=-1.0, stop_on="epoch", small_data=0, retries=0
    )
    recovery = RecoverSettings(loss_scale=0.2, epochs=epochs, small_data=0)
    fitting = free_memory(plan.device) // 2 // footprint(models[0], rnp.BATCH)
    size = max(1, min(len(models), fitting, _RNP_MODELS))

    def mine(count: int) -> list[float]:
        unlearned = bdprune.stack(models[:count]).unlearn(data, unlearning)
        bdprune.stack([one.model for one in unlearned]).recover(data, recovery)  # type: ignore[union-attr]
        stack = bdprune.stack(models[:count])
        sweeps = stack.sweep([masks] * count, [data], SweepSettings(rnp.THRESHOLDS, 1.0, stop_early=False))
        return [point.clean_accuracy for point in sweeps[0].points]

    def plain(style: rnp.Style, frozen: rnp.Style, batch: int, copies: bool) -> list[float]:
        rnp.plain_unlearn(models[0], data, style, epochs=epochs)
        rnp.plain_recover(models[0], data, frozen, epochs=epochs)
        return rnp.plain_sweep(models[0], masks, data, batch, style, copies)

    @cache
    def truth() -> list[float]:
        return rnp.plain_sweep(models[0], masks, data, rnp.BATCH, rnp.TRUTH, True)

    last = "channels_last, fused SGD"
    variants = (
        Variant("published loops", "author", lambda: plain(rnp.AUTHOR, rnp.AUTHOR, rnp.BATCH, True)),
        Variant(last, "eager", lambda: plain(rnp.EAGER[last], rnp.FROZEN[f"frozen weights, {last}"], 500, False)),
        Variant(
            "bdprune.stack(models)", "ours", lambda: mine(size), 1 / size, f"{size} models in one stack, per model"
        ),
        Variant("bdprune.stack of one model", "ours", lambda: mine(1)),
    )
    steps = -(-images // rnp.BATCH) * epochs
    forward = conv_flops(models[0].network) * images
    work = Work(7 * weight_bytes(models[0].network) * steps, (5 * epochs + len(rnp.THRESHOLDS)) * forward)
    return Benchmark(
        f"{NAME}, RNP per model",
        f"{len(models)} x ResNet-18 width {width}, {images} images, {epochs} epochs of each phase, whole sweeps",
        variants,
        (work,),
        lambda found: max_or_nan([abs(a - b) for a, b in zip(found, truth(), strict=True)]),
        "largest error of a clean accuracy of the sweep",
        seconds=plan.seconds / 4,
        host=True,
    )
