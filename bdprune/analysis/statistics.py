"""Per-filter statistics of a model on clean images: saliency, activation norm and correlation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from bdprune.analysis.case import Analysis, Case
from bdprune.analysis.saliency import saliency, separable, summed_saliency
from bdprune.data import CleanData
from bdprune.errors import ArchitectureError
from bdprune.model import FilterGroup, Model
from bdprune.ops import ChannelMoments

_BATCH = 100


@dataclass(frozen=True)
class FilterStatistics:
    """Statistics of the filters of one group on clean images; every field is ``[num_filters]``, float64, CPU.

    Attributes:
        saliency: mean over images of the norm of the loss gradient of the filter's weights, divided by their number;
            NaN if it was not computed.
        activation: mean over images of the L2 norm of the filter's normalised map, divided by sqrt(H W).
        correlation: mean absolute Pearson correlation with the other filters of the group, in [0, 1], over images
            and positions; 1 for a filter with a constant map, which is no evidence and so counts as not suspicious.
    """

    saliency: Tensor
    activation: Tensor
    correlation: Tensor


@dataclass(frozen=True)
class Statistics(Analysis[dict[str, FilterStatistics]]):
    """:func:`filter_statistics` of every filter group, with its settings."""

    salient: bool = True
    per_image: bool = True
    order: int = 1
    rectified: bool = False

    def compute(self, case: Case) -> dict[str, FilterStatistics]:
        return filter_statistics(case.model, case.images, **asdict(self))


def filter_statistics(
    model: Model,
    data: CleanData,
    *,
    salient: bool = True,
    per_image: bool = True,
    order: int = 1,
    rectified: bool = False,
) -> dict[str, FilterStatistics]:
    """Statistics of every filter group on ``data``, batch norms in eval mode.

    One forward and one backward pass compute all of them. If one pass cannot separate the gradients of single images
    (shared weights, custom convs), each image gets its own backward pass.

    Args:
        salient: False skips the backward pass and sets the saliency to NaN.
        per_image: take the gradient norm per image and average; otherwise the norm of the batch gradient.
        order: 1 for the L1 norm of the gradient, 2 for the L2 norm.
        rectified: measure activations after a ReLU.
    """
    at_once = salient and per_image and separable(model, data, order)
    module = model.clone().module.eval().requires_grad_(False)
    network = module.get_submodule("network")
    moments = {group.name: ChannelMoments(group.num_filters, device=model.device) for group in model.groups}
    for group in model.groups:
        last_layer(network, group).register_forward_hook(_observer(group, moments[group.name], rectified))
    start = 0.0 if at_once else torch.nan
    gradients = {group.name: torch.full((group.num_filters,), start, dtype=torch.float64) for group in model.groups}
    for images, labels in zip(data.images.split(_BATCH), data.labels.split(_BATCH), strict=True):
        images, labels = images.to(model.device), labels.to(model.device)
        if at_once:
            for name, part in summed_saliency(module, model.groups, images, labels, order).items():
                gradients[name] += part / len(data)
        else:
            with torch.no_grad():
                module(images)
    if salient and not at_once:
        gradients = saliency(model, data, per_image, order)
    return {
        group.name: FilterStatistics(
            gradients[group.name], moments[group.name].activation_norm.cpu(), mean_correlation(moments[group.name])
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


def layer_z_scores(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``(score - mean) / std`` within each layer, unbiased standard deviation as in CLP.

    A layer with fewer than three filters, or with equal scores, gets zeros: it has no outliers.
    """
    return {name: _z(score.double()) for name, score in scores.items()}


def last_layer(network: nn.Module, group: FilterGroup) -> nn.Module:
    """The layer whose output a group's filters have: their norm, or their conv if they have none.

    Raises:
        ArchitectureError: the network uses the conv's weight without calling the conv, so no layer has this output.
    """
    if group.norm is None and not group.as_module:
        raise ArchitectureError(
            f"The network uses the weight of {group.conv} without calling this conv, so its maps cannot be read.",
            "Call the layer in the network's forward pass, or use the method rnp, anp, awm or clp.",
        )
    return network.get_submodule(group.norm.name if group.norm else group.conv)


def _observer(
    group: FilterGroup, moments: ChannelMoments, rectified: bool
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    start = group.norm.start if group.norm else 0

    def observe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        maps = output[:, start : start + group.num_filters]
        moments.update(maps.relu() if rectified else maps)

    return observe


def _z(score: Tensor) -> Tensor:
    if len(score) < 3:
        return torch.zeros_like(score)
    spread = score.std()
    return torch.zeros_like(score) if spread == 0 else (score - score.mean()) / spread
