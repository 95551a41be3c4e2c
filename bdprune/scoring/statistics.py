"""Per-filter statistics of a model on clean images: saliency, activation norm and correlation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.data.clean import CleanData
from bdprune.model.groups import FilterGroup
from bdprune.model.handle import Model
from bdprune.ops import ChannelMoments


@dataclass(frozen=True)
class FilterStatistics:
    """What clean images say about the filters of one group; every field is ``[num_filters]``, float64, CPU.

    Attributes:
        saliency: mean over images of the norm of the loss gradient of the filter's weights, divided by their number.
        activation: mean over images of the L2 norm of the filter's normalised map, divided by sqrt(H W).
        correlation: mean absolute Pearson correlation with the other filters of the group, in [0, 1], over images
            and positions; 1 for a filter whose map is constant, which says nothing and so is not suspicious.
    """

    saliency: Tensor
    activation: Tensor
    correlation: Tensor


def filter_statistics(
    model: Model, data: CleanData, *, per_image: bool = True, order: int = 1, rectified: bool = False
) -> dict[str, FilterStatistics]:
    """Statistics of every filter group on ``data``, batch norms in eval mode.

    Args:
        per_image: take the gradient norm per image and average; otherwise the norm of the batch gradient.
        order: 1 for the L1 norm of the gradient, 2 for the L2 norm.
        rectified: measure activations after a ReLU.
    """
    saliency = _saliency(model, data, per_image, order)
    moments = _moments(model, data, rectified)
    return {
        group.name: FilterStatistics(
            saliency[group.name], moments[group.name].activation_norm.cpu(), mean_correlation(moments[group.name])
        )
        for group in model.groups
    }


def mean_correlation(moments: ChannelMoments) -> Tensor:
    """Mean absolute correlation of each channel with the others, ``[C]``; 1 for constant channels and for C = 1."""
    correlation = moments.correlation().cpu().abs()
    channels = len(correlation)
    if channels < 2:
        return torch.ones(channels, dtype=torch.float64)
    mean = (correlation.sum(1) - correlation.diagonal()) / (channels - 1)
    return torch.where(moments.variance.cpu() > 0, mean, 1.0)


def _saliency(model: Model, data: CleanData, per_image: bool, order: int) -> dict[str, Tensor]:
    worker = model.clone()
    module = worker.module.eval()
    module.requires_grad_(False)
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
            flat = gradient.flatten(1).double()
            total[name] += (torch.linalg.vector_norm(flat, order, dim=1) / flat.shape[1]).cpu()
    return {name: value / len(chunks) for name, value in total.items()}


def _moments(model: Model, data: CleanData, rectified: bool) -> dict[str, ChannelMoments]:
    module = model.clone().module.eval()
    network = module.get_submodule("network")
    moments = {group.name: ChannelMoments(group.num_filters, device=model.device) for group in model.groups}
    for group in model.groups:
        _watched(network, group).register_forward_hook(_observer(group, moments[group.name], rectified))
    with torch.no_grad():
        for images in data.images.split(100):
            module(images.to(model.device))
    return moments


def _watched(network: nn.Module, group: FilterGroup) -> nn.Module:
    return network.get_submodule(group.norm.name if group.norm else group.conv)


def _observer(
    group: FilterGroup, moments: ChannelMoments, rectified: bool
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    start = group.norm.start if group.norm else 0

    def observe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        maps = output[:, start : start + group.num_filters]
        moments.update(maps.relu() if rectified else maps)

    return observe
