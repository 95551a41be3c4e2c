"""The suspiciousness score with all four factors, and the methods that it should outrun.

The exponent of the saliency is set to one here (it is zero by default), so that no rung can leave out the backward
passes. All rungs combine their factors by the same formula.
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
from bench.ladders import channel_moments, filter_spectral_norms, rivals
from bench.ladders.ladder import Ladder, Rung, Work, can_compile, relative_error
from bench.ladders.networks import clean_images, conv_flops, resnet18, weight_bytes
from bench.ladders.plan import Plan

SCORE = Suspiciousness(saliency=1)
_CHUNK = 10

Scores = dict[str, Tensor]
Saliency = Callable[[Model, CleanData], Scores]
"""Mean over images of the L1 norm of each filter's gradient over its size: group name -> ``[num_filters]``."""


def ladders(plan: Plan) -> list[Ladder]:
    """ResNet-18 with a hundred images."""
    model = resnet18(plan.width, plan.device)
    return [score_ladder(plan, model, clean_images(plan.score_images, plan.device))]


def score_ladder(plan: Plan, model: Model, data: CleanData) -> Ladder:
    """The floor is one forward and one backward pass, and half of the symmetric products of the maps."""
    variants: dict[str, tuple[Saliency, Callable[[Tensor], channel_moments.Moments]]] = {
        "backward pass per image, corrcoef": (by_image, channel_moments.by_corrcoef),
        f"vmap of grad over {_CHUNK} images": (by_vmap, channel_moments.by_addmm),
        "one backward pass, gradients from unfolded maps": (by_unfolding, channel_moments.by_addmm),
    }
    svd, gram = filter_spectral_norms.author_loop, filter_spectral_norms.gram_eigvalsh
    rungs = (
        Rung(
            "the formulas as loops",
            "author",
            lambda: plain(model, data, by_image, channel_moments.by_channel, svd),
            note=_NO,
        ),
        *(
            Rung(f"{name}, Gram + eigvalsh", "eager", partial(plain, model, data, saliency, second, gram))
            for name, (saliency, second) in variants.items()
        ),
        *_compiled(plan, model, data),
        Rung("bdprune.scoring.Suspiciousness", "ours", lambda: SCORE(model, data)),
        Rung(
            "the same without saliency (the default)",
            "ours",
            lambda: Suspiciousness()(model, data),
            note="another score; three factors count",
            exact=False,
        ),
        *rivals.rungs(plan, model, data),
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
    return Ladder(
        "Suspiciousness score",
        f"ResNet-18 width {plan.width}, {len(data)} images, all four factors",
        rungs,
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
    """The score in plain PyTorch, from one way to get each factor."""
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
    """Forward and backward one image at a time."""
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
    """Gradients of ten images at a time by ``torch.func``; all weights' gradients of ten images lie in memory."""
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
    """Mean over images of the mean magnitude of each filter's gradient, ten images at a time."""
    assert isinstance(conv, nn.Conv2d)
    total = x.new_zeros(conv.out_channels)
    for part, above in zip(x.split(_CHUNK), upstream.split(_CHUNK), strict=True):
        columns = functional.unfold(part, conv.weight.shape[2:], padding=conv.padding, stride=conv.stride)
        total += torch.bmm(above.flatten(2), columns.mT).abs().mean(2).sum(0)
    return total / len(x)


def _second_moments(
    model: Model, data: CleanData, second: Callable[[Tensor], channel_moments.Moments]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Correlation and activation norm of every group from one forward pass, each layer's map dropped at once."""
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
    """As ours: constant channels, whose correlation is no number here, say nothing."""
    magnitude = correlation.double().cpu().abs()
    mean = (magnitude.nan_to_num(0).sum(1) - 1) / (len(magnitude) - 1)
    return torch.where(magnitude.diagonal().isfinite(), mean, 1.0)


def _worker(model: Model) -> tuple[nn.Module, Scores]:
    """A copy in eval mode in which only the convolutions' weights ask for gradients, and those weights."""
    worker = model.clone()
    worker.network.requires_grad_(False)
    weights = {group.name: worker.network.get_parameter(f"{group.conv}.weight") for group in model.groups}
    for weight in weights.values():
        weight.requires_grad_()
    return worker.module.eval(), weights


def _compiled(plan: Plan, model: Model, data: CleanData) -> tuple[Rung, ...]:
    if plan.quick or not can_compile(plan.device):
        return ()
    kept: list[tuple[nn.Module, Scores]] = []

    def saliency(model: Model, data: CleanData) -> Scores:
        # A new copy of the network each time would be compiled each time.
        if not kept:
            module, weights = _worker(model)
            kept.append((cast(nn.Module, torch.compile(module, dynamic=False)), weights))
        return by_image(model, data, kept[0])

    run = partial(plain, model, data, saliency, channel_moments.by_addmm, filter_spectral_norms.gram_eigvalsh)
    return (Rung("torch.compile: backward pass per image", "compile", run),)


def _map_work(width: int) -> list[tuple[float, float]]:
    """(bytes, FLOPs) a layer's map of one image takes: read once, half of a symmetric product."""
    sizes = channel_moments.resnet18_maps(width)
    return [(4.0 * c * h * w, float(c * (c + 1) * h * w)) for c, h, w in sizes]
