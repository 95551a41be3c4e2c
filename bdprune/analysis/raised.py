"""Filters that a recovered trigger raises, and what happens when they are pruned.

A backdoor is carried by filters that its trigger raises far above their values on clean images. In a backdoored
network a few of them can be pruned at little cost, and the trigger stops working. In a clean network a recovered
trigger uses the features of the target class, and pruning those costs accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bdprune.analysis.statistics import last_layer
from bdprune.data import CleanData
from bdprune.loops import PrunedPredictions, Trigger
from bdprune.model import FilterGroup, Model

_BATCH = 100
_TOP = 0.05  # share of all filters that count as raised most
_FLOOR = 1e-3  # added to the standard deviation: a filter that never fires on clean images has none


@dataclass(frozen=True)
class PrunedPoint:
    """The network with the filters pruned that a trigger raises most.

    Attributes:
        filters: number of pruned filters.
        clean_accuracy: on held-out clean images, in [0, 1].
        flip_rate: share of the held-out images that the trigger still flips, in [0, 1].
    """

    filters: int
    clean_accuracy: float
    flip_rate: float


def selectivity(points: Sequence[PrunedPoint], weight: float) -> float:
    """How selectively pruning stops a trigger, at most 1: the share of its flips that it loses at little cost.

    It is the largest value over ``points`` of ``lost flips - weight * lost accuracy``, both relative to the first
    point, which has no filter pruned; 0 if the trigger flips nothing.
    """
    accuracy, flips = points[0].clean_accuracy, points[0].flip_rate
    if not accuracy or not flips:
        return 0.0
    return max(
        (flips - one.flip_rate) / flips - weight * max(accuracy - one.clean_accuracy, 0.0) / accuracy for one in points
    )


@torch.no_grad()
def raised_filters(model: Model, trigger: Trigger, images: Tensor) -> dict[str, Tensor]:
    """How far a trigger raises each filter, in standard deviations of the filter on clean images.

    The value of a filter is the mean of its rectified map after the norm.

    Args:
        trigger: stamped on the images.
        images: clean images ``[N, C, H, W]`` in [0, 1].

    Returns:
        Group name -> ``[num_filters]``, float64, on the CPU.
    """
    clean = _filter_values(model, images)
    stamped = _filter_values(model, trigger.apply(images.to(model.device)))
    return {
        name: (stamped[name] - value).mean(0) / (value.std(0, unbiased=False) + _FLOOR) for name, value in clean.items()
    }


@torch.no_grad()
def natural_share(model: Model, ranked: Mapping[str, Tensor], data: CleanData, target: int) -> float:
    """Share of the filters that a trigger raises most which clean images of its target raise most, too, in [0, 1].

    Args:
        ranked: from :func:`raised_filters`.
        data: clean images of all labels.
        target: label that the trigger leads to.

    Returns:
        0 if there are no images of the target, or of other labels.
    """
    own = data.labels == target
    if own.all() or not own.any():
        return 0.0
    values = torch.cat(list(_filter_values(model, data.images).values()), 1)
    spread = values.std(0, unbiased=False) + _FLOOR
    of_label = (values[own].mean(0) - values[~own].mean(0)) / spread
    of_trigger = torch.cat(list(ranked.values()))
    count = max(1, round(_TOP * len(of_trigger)))
    top, common = (set(one.topk(count).indices.tolist()) for one in (of_trigger, of_label))
    return len(top & common) / count


def prune_raised(
    model: Model, trigger: Trigger, ranked: Mapping[str, Tensor], data: CleanData, counts: Sequence[int]
) -> list[PrunedPoint]:
    """Clean accuracy and flips of ``trigger`` after pruning the filters that it raises most.

    Args:
        ranked: from :func:`raised_filters`.
        data: held-out clean images.
        counts: numbers of pruned filters, increasing.
    """
    flat = torch.cat(list(ranked.values()))
    owner = [(name, index) for name, value in ranked.items() for index in range(len(value))]
    order = flat.argsort(descending=True, stable=True).tolist()
    prunings = [_grouped([owner[place] for place in order[:count]]) for count in counts]
    labels = data.labels
    taken = trigger.takes(labels)
    stamped = trigger.apply(data.images[taken])
    predictions = PrunedPredictions(model, (data.images, stamped), prunings, "zero_gamma")
    return [
        PrunedPoint(
            count,
            (predictions.predict(step, 0) == labels).float().mean().item(),
            trigger.flips(predictions.predict(step, 1), labels[taken]).float().mean().item() if taken.any() else 0.0,
        )
        for step, count in enumerate(counts)
    ]


def _grouped(filters: Sequence[tuple[str, int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, index in filters:
        found.setdefault(name, []).append(index)
    return found


def _filter_values(model: Model, images: Tensor) -> dict[str, Tensor]:
    """Group name -> mean of every filter's rectified map for each image ``[N, num_filters]``, float64, CPU."""
    module = model.clone().module.eval()
    network = module.get_submodule("network")
    found: dict[str, list[Tensor]] = {group.name: [] for group in model.groups}
    for group in model.groups:
        last_layer(network, group).register_forward_hook(partial(_observe, group, found[group.name].append))
    for batch in images.split(_BATCH):
        module(batch.to(model.device))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _observe(
    group: FilterGroup, keep: Callable[[Tensor], None], module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    start = group.norm.start if group.norm else 0
    maps = output[:, start : start + group.num_filters].relu()
    keep(maps.flatten(2).mean(2).double().cpu())
