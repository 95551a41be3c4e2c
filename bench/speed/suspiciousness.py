"""The suspiciousness score with all four factors, and alternative methods.

The exponent of the saliency is 1 here (0 by default), so that every variant needs the backward passes. All variants
combine their factors by the same formula.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from bdprune.analysis import FilterStatistics, Suspiciousness, norm_gain
from bdprune.data import CleanData
from bdprune.model import Model
from bench.speed import alternatives, channel_moments, filter_spectral_norms
from bench.speed.benchmark import Benchmark, Variant, Work, can_compile, relative_error
from bench.speed.networks import clean_images, conv_flops, resnet18, weight_bytes
from bench.speed.plan import Plan

SCORE = Suspiciousness(saliency=1)
_CHUNK = 10

Scores = dict[str, Tensor]
Saliency = Callable[[Model, CleanData], Scores]
"""Mean over images of the mean absolute gradient of each filter: group name -> ``[num_filters]``."""


def benchmarks(plan: Plan) -> list[Benchmark]:
    """ResNet-18 with the clean images of the plan."""
    model = resnet18(plan.width, plan.device)
    return [score_benchmark(plan, model, clean_images(plan.score_images, plan.device))]


def score_benchmark(plan: Plan, model: Model, data: CleanData) -> Benchmark:
    """The lower bound is one forward pass, one backward pass, and half of the symmetric products of the maps."""
    factors: dict[str, tuple[Saliency, Callable[[Tensor], channel_moments.Moments]]] = {
        "backward pass per image, corrcoef": (by_image, channel_moments.by_corrcoef),
        f"vmap of grad over {_CHUNK} images": (by_vmap, channel_moments.by_addmm),
        "one backward pass, gradients from unfolded maps": (by_unfolding, channel_moments.by_addmm),
    }
    svd, gram = filter_spectral_norms.author_loop, filter_spectral_norms.gram_eigvalsh
    variants = (
        Variant(
            "the formulas as loops",
            "author",
            lambda: plain(model, data, by_image, channel_moments.by_channel, svd),
            note=_NO,
        ),
        *(
            Variant(f"{name}, Gram + eigvalsh", "eager", partial(plain, model, data, saliency, second, gram))
            for name, (saliency, second) in factors.items()
        ),
        *_compiled(plan, model, data),
        Variant("bdprune.analysis.Suspiciousness", "ours", lambda: SCORE(model, data)),
        Variant(
            "the same without saliency (the default)",
            "ours",
            lambda: Suspiciousness()(model, data),
            note="a different score with three factors",
            exact=False,
        ),
        *alternatives.variants(plan, model, data),
    )

    @cache
    def truth() -> list[Tensor]:
        wide = model.clone()
        wide.network.double()
        vars(wide)["groups"] = model.groups  # tracing sends float32 images
        exact = CleanData(data.images.double(), data.labels)
        return list(
            plain(wide, exact, by_image, channel_moments.by_rows, filter_spectral_norms.batched_svdvals).values()
        )

    per_image = conv_flops(model.network)
    maps = [Work(one * len(data), two * len(data)) for one, two in _map_work(plan.width)]
    work = (Work(weight_bytes(model.network), 3 * per_image * len(data)), *maps)
    return Benchmark(
        "Suspiciousness score",
        f"ResNet-18 width {plan.width}, {len(data)} images, all four factors",
        variants,
        work,
        lambda found: relative_error(list(found.values()), truth()),
        "largest error of a score, relative to the largest of its layer",
        seconds=3 * plan.seconds,
        host=True,
    )


_NO = "no public code exists; the formulas, filter by filter and image by image"


def plain(
    model: Model,
    data: CleanData,
    saliency: Saliency,
    second: Callable[[Tensor], channel_moments.Moments],
    norms: Callable[[list[Tensor]], list[Tensor]],
) -> Scores:
    """The score in plain PyTorch, from one function per factor."""
    gradients = saliency(model, data)
    found = _second_moments(model, data, second)
    weights = [model.network.get_parameter(f"{group.conv}.weight").detach() for group in model.groups]
    sigma, statistics = {}, {}
    for group, norm in zip(model.groups, norms(weights), strict=True):
        gain = norm_gain(model.network, group)
        sigma[group.name] = (norm if gain is None else norm * gain).cpu()
        correlation, activation = found[group.name]
        statistics[group.name] = FilterStatistics(
            gradients[group.name].double().cpu(), activation.double().cpu(), _mean_correlation(correlation)
        )
    return SCORE.combine(statistics, sigma)


def by_image(model: Model, data: CleanData, worker: tuple[nn.Module, Scores] | None = None) -> Scores:
    """Forward and backward passes, one image at a time."""
    module, weights = worker or _worker(model)
    total = {
        name: torch.zeros(len(weight), device=weight.device, dtype=weight.dtype) for name, weight in weights.items()
    }
    for image, label in zip(data.images.split(1), data.labels.split(1), strict=True):
        loss = functional.cross_entropy(module(image.to(model.device)), label.to(model.device))
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            total[name] += gradient.abs().flatten(1).mean(1)
    return {name: value / len(data) for name, value in total.items()}


def by_vmap(model: Model, data: CleanData) -> Scores:
    """Gradients of ten images at a time with ``torch.func``; keeps ten gradients of every weight in memory."""
    module, weights = _worker(model)
    names = {f"network.{name}.weight": name for name in weights}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(module, parameters, (image[None],)), label[None])

    parameters = {key: weights[name].detach() for key, name in names.items()}
    gradients = vmap(grad(loss), in_dims=(None, 0, 0))
    total: Scores = {}
    for images, labels in zip(data.images.split(_CHUNK), data.labels.split(_CHUNK), strict=True):
        chunk = gradients(parameters, images.to(model.device), labels.to(model.device))
        for key, name in names.items():
            norms = chunk[key].abs().flatten(2).mean(2).sum(0)
            total[name] = total[name] + norms if name in total else norms
    return {name: value / len(data) for name, value in total.items()}


def by_unfolding(model: Model, data: CleanData) -> Scores:
    """One forward and one backward pass over all images; each image's weight gradient from its unfolded input."""
    module, weights = _worker(model)
    for weight in weights.values():
        weight.requires_grad_(False)
    inputs: Scores = {}
    outputs: Scores = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(conv: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = given[0].detach(), output

        return hook

    convs = {name: module.get_submodule(f"network.{name}") for name in weights}
    for name, conv in convs.items():
        conv.register_forward_hook(keep(name))
    images = data.images.to(model.device).requires_grad_()
    loss = functional.cross_entropy(module(images), data.labels.to(model.device), reduction="sum")
    upstream = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    return {name: _unfolded(convs[name], inputs.pop(name), upstream.pop(name)) for name in convs}


def _unfolded(conv: nn.Module, x: Tensor, upstream: Tensor) -> Tensor:
    """Mean over images of the mean absolute gradient of each filter, ten images at a time."""
    assert isinstance(conv, nn.Conv2d)
    total = x.new_zeros(conv.out_channels)
    for part, above in zip(x.split(_CHUNK), upstream.split(_CHUNK), strict=True):
        columns = functional.unfold(part, conv.weight.shape[2:], padding=conv.padding, stride=conv.stride)
        total += torch.bmm(above.flatten(2), columns.mT).abs().mean(2).sum(0)
    return total / len(x)


def _second_moments(
    model: Model, data: CleanData, second: Callable[[Tensor], channel_moments.Moments]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Correlation and activation norm of every group from one forward pass; frees each map immediately."""
    module = model.clone().module.eval()
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(norm: nn.Module, given: object, output: Tensor) -> None:
            found[name] = second(output.relu())[1:]

        return hook

    for group in model.groups:
        assert group.norm is not None
        module.get_submodule(f"network.{group.norm.name}").register_forward_hook(watch(group.name))
    with torch.no_grad():
        module(data.images.to(model.device))
    return found


def _mean_correlation(correlation: Tensor) -> Tensor:
    """As in ours: ignores constant channels, whose correlation is NaN here."""
    magnitude = correlation.double().cpu().abs()
    mean = (magnitude.nan_to_num(0).sum(1) - 1) / (len(magnitude) - 1)
    return torch.where(magnitude.diagonal().isfinite(), mean, 1.0)


def _worker(model: Model) -> tuple[nn.Module, Scores]:
    """A copy in eval mode where only the convolution weights need gradients, and those weights."""
    worker = model.clone()
    worker.network.requires_grad_(False)
    weights = {group.name: worker.network.get_parameter(f"{group.conv}.weight") for group in model.groups}
    for weight in weights.values():
        weight.requires_grad_()
    return worker.module.eval(), weights


def _compiled(plan: Plan, model: Model, data: CleanData) -> tuple[Variant, ...]:
    if plan.quick or not can_compile(plan.device):
        return ()
    kept: list[tuple[nn.Module, Scores]] = []

    def saliency(model: Model, data: CleanData) -> Scores:
        # A new copy of the network would be compiled again in each call.
        if not kept:
            module, weights = _worker(model)
            kept.append((cast(nn.Module, torch.compile(module, dynamic=False)), weights))
        return by_image(model, data, kept[0])

    run = partial(plain, model, data, saliency, channel_moments.by_addmm, filter_spectral_norms.gram_eigvalsh)
    return (Variant("torch.compile: backward pass per image", "compile", run),)


def _map_work(width: int) -> list[tuple[float, float]]:
    """(bytes, FLOPs) of each layer's map of one image: one read and half of a symmetric product."""
    sizes = channel_moments.resnet18_maps(width)
    return [(4.0 * c * h * w, float(c * (c + 1) * h * w)) for c, h, w in sizes]
