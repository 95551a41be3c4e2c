"""Saliency: size of the loss gradient of single images with respect to the weights of each filter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from bdprune.data import CleanData
from bdprune.model import FilterGroup, Model

_ALIKE = 1e-3  # relative difference that rounding can cause


def saliency(model: Model, data: CleanData, per_image: bool, order: int) -> dict[str, Tensor]:
    """Mean over images of the norm of each filter's gradient, or norm of the batch gradient; divided by its size.

    With ``per_image``, takes one backward pass for each image.

    Args:
        per_image: take the norm per image and average; otherwise the norm of the gradient of the mean loss.
        order: 1 for the L1 norm, 2 for the L2 norm.

    Returns:
        Group name -> ``[num_filters]``, float64, CPU.
    """
    worker = model.clone()
    module = worker.module.eval().requires_grad_(False)
    weights = {group.name: worker.network.get_submodule(group.conv).weight for group in model.groups}
    for weight in weights.values():
        weight.requires_grad_(True)
    total = {group.name: torch.zeros(group.num_filters, dtype=torch.float64) for group in model.groups}
    chunks = torch.arange(len(data)).split(1 if per_image else len(data))
    for index in chunks:
        images, labels = data.images[index].to(model.device), data.labels[index].to(model.device)
        loss = functional.cross_entropy(module(images), labels)
        gradients = torch.autograd.grad(loss, list(weights.values()))  # type: ignore[arg-type]
        for name, gradient in zip(weights, gradients, strict=True):
            total[name] += _norms(gradient.double(), order).cpu()
    return {name: value / len(chunks) for name, value in total.items()}


def summed_saliency(
    module: nn.Module, groups: tuple[FilterGroup, ...], images: Tensor, labels: Tensor, order: int
) -> dict[str, Tensor]:
    """Saliency summed over the images, from one forward and one backward pass over all of them.

    Each conv's input is kept until the gradient of its output arrives; both give the weight gradient of each image.
    Correct only if :func:`separable`.

    Args:
        module: images -> logits, in eval mode, with ``network`` inside; its parameters require no gradient.
        images: ``[N, C, H, W]`` in [0, 1], on the module's device, as are the labels ``[N]``.
        order: 1 for the L1 norm, 2 for the L2 norm.

    Returns:
        Group name -> ``[num_filters]``, float64, CPU.
    """
    found: dict[str, Tensor] = {}
    convs = {group.name: module.get_submodule(f"network.{group.conv}") for group in groups}
    hooks = [conv.register_forward_hook(_watcher(name, order, found)) for name, conv in convs.items()]
    try:
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            loss = functional.cross_entropy(module(images), labels, reduction="sum")
            torch.autograd.grad(loss, images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def separable(model: Model, data: CleanData, order: int) -> bool:
    """Whether one pass can separate the gradients of single images: its result for one image agrees with autograd."""
    module = model.clone().module.eval().requires_grad_(False)
    convs = [module.get_submodule(f"network.{group.conv}") for group in model.groups]
    if not all(
        type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and isinstance(conv.padding, tuple) for conv in convs
    ):
        return False
    one = data.subset(torch.arange(1))
    truth = saliency(model, one, True, order)
    images, labels = one.images.to(model.device), one.labels.to(model.device)
    found = summed_saliency(module, model.groups, images, labels, order)
    return found.keys() == truth.keys() and all(_alike(found[name], truth[name]) for name in truth)


def _alike(found: Tensor, truth: Tensor) -> bool:
    return torch.allclose(found, truth, rtol=_ALIKE, atol=_ALIKE * float(truth.abs().max()))


def _watcher(
    name: str, order: int, found: dict[str, Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def watch(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        output.register_hook(partial(add, conv, inputs[0].detach()))

    def add(conv: nn.Conv2d, x: Tensor, upstream: Tensor) -> None:
        found[name] = sum(
            (_norms(_weight_gradient(conv, *one), order) for one in zip(x.split(1), upstream.split(1), strict=True)),
            torch.zeros(conv.out_channels, dtype=torch.float64, device=x.device),
        ).cpu()

    return watch


def _weight_gradient(conv: nn.Conv2d, x: Tensor, upstream: Tensor) -> Tensor:
    """``[O, I / groups, kh, kw]`` from the input and the output gradient of one image."""
    shape = conv.weight.shape
    gradient: Tensor = conv2d_weight(x, shape, upstream, conv.stride, conv.padding, conv.dilation, conv.groups)
    return gradient


def _norms(gradient: Tensor, order: int) -> Tensor:
    """Norm of each filter's gradient divided by its size: ``[O, ...]`` to ``[O]``."""
    flat = gradient.flatten(1)
    norms: Tensor = torch.linalg.vector_norm(flat, order, dim=1) / flat.shape[1]
    return norms
