"""Filters that unlearning changes most, and what happens when they are raised or pruned.

A network that unlearns its task first falls onto its backdoor, and the filters that carry the backdoor change most
(Lin et al., Unveiling and Mitigating Backdoor Vulnerabilities based on Unlearning Weight Changes and Backdoor
Activeness, NeurIPS 2024). In the original network, raising them sends all images to the target label, and pruning them
costs the clean task little. The filters that change most in a clean network are those of its task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bdprune.analysis.statistics import last_layer
from bdprune.data import CleanData
from bdprune.loops import PrunedPredictions
from bdprune.model import FilterGroup, Model
from bdprune.ops import ChannelMoments
from bdprune.runtime import predict, share_right

RAISED_SHARES = (0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06)
"""Shares of all filters that are raised and pruned."""

RAISED_WEIGHT = 4.0
"""Flips that equal the same share of lost accuracy."""

_BATCH = 100


@dataclass(frozen=True)
class RaisedPoint:
    """The network with some filters raised, and with the same filters pruned.

    Attributes:
        filters: number of filters.
        flip_rates: for each label the share of the images of other labels that are predicted as it with the filters
            raised, in [0, 1], ``[K]``.
        clean_accuracy: with the filters pruned, in [0, 1].
    """

    filters: int
    flip_rates: tuple[float, ...]
    clean_accuracy: float


def moved_filters(model: Model, unlearned: Model) -> dict[str, Tensor]:
    """How far unlearning moved each filter: the sum of the absolute changes of its weights.

    Args:
        model: the original network.
        unlearned: the same layers with other weights.

    Returns:
        Group name -> ``[num_filters]``, float64, on the CPU.
    """
    found = {}
    for group in model.groups:
        before, after = (one.network.get_parameter(f"{group.conv}.weight").detach() for one in (model, unlearned))
        found[group.name] = (after.double() - before.double()).abs().flatten(1).sum(1).cpu()
    return found


def raised_counts(ranked: Mapping[str, Tensor]) -> list[int]:
    """The numbers of filters that are raised and pruned, increasing; the first is 0.

    Args:
        ranked: from :func:`moved_filters`.
    """
    filters = sum(map(len, ranked.values()))
    return sorted({round(share * filters) for share in RAISED_SHARES})


@torch.no_grad()
def raise_moved(
    model: Model, ranked: Mapping[str, Tensor], data: CleanData, counts: Sequence[int]
) -> list[RaisedPoint]:
    """Predictions after raising the filters that moved most, and clean accuracy after pruning them.

    A filter is raised by one standard deviation of its output, after the norm, on the images.

    Args:
        ranked: from :func:`moved_filters`.
        data: clean images of several labels.
        counts: numbers of filters, increasing; 0 is the network itself.
    """
    flat = torch.cat(list(ranked.values()))
    order = flat.argsort(descending=True, stable=True)
    chosen = [_chosen(ranked, order[:count]) for count in counts]
    pruned = PrunedPredictions(model, (data.images,), [_indices(one) for one in chosen], "zero_gamma")
    spreads = _spreads(model, data.images)
    points = []
    for step, (count, one) in enumerate(zip(counts, chosen, strict=True)):
        shifts = {name: taken * spreads[name] for name, taken in one.items() if name in spreads and taken.any()}
        rates = _flip_rates(_predict_raised(model, shifts, data.images), data.labels, model.num_classes)
        points.append(RaisedPoint(count, rates, share_right(pruned.predict(step, 0), data.labels.cpu())))
    return points


def easiest_label(points: Sequence[RaisedPoint], weight: float) -> tuple[float, int | None]:
    """The label that raising reaches at the smallest cost, and its score, at most 1.

    The score is the largest value over ``points`` and labels of ``gained flips - weight * lost accuracy``. Both are
    relative to the first point, which has no filter raised: to the images that could still be flipped, and to the clean
    accuracy. It is 0 for None, if no label gains more than it costs.

    Args:
        points: from :func:`raise_moved`; the first one has no filter.
        weight: share of gained flips that equals the same share of lost accuracy.
    """
    first = points[0]
    best: tuple[float, int | None] = (0.0, None)
    if not first.clean_accuracy:
        return best
    for point in points[1:]:
        cost = weight * max(first.clean_accuracy - point.clean_accuracy, 0.0) / first.clean_accuracy
        for label, (before, after) in enumerate(zip(first.flip_rates, point.flip_rates, strict=True)):
            score = (after - before) / (1 - before) - cost if before < 1 else 0.0
            if score > best[0]:
                best = score, label
    return best


def _chosen(ranked: Mapping[str, Tensor], places: Tensor) -> dict[str, Tensor]:
    """Which filters of each group are at ``places`` of the list of all filters, bool ``[num_filters]``."""
    taken = torch.zeros(sum(map(len, ranked.values())), dtype=torch.bool)
    taken[places] = True
    return dict(zip(ranked, taken.split([len(value) for value in ranked.values()]), strict=True))


def _indices(chosen: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: taken.nonzero().flatten().tolist() for name, taken in chosen.items() if taken.any()}


def _flip_rates(predicted: Tensor, labels: Tensor, num_classes: int) -> tuple[float, ...]:
    labels = labels.cpu()
    rates = []
    for label in range(num_classes):
        others = labels != label
        rates.append((predicted[others] == label).double().mean().item() if others.any() else 0.0)
    return tuple(rates)


def _spreads(model: Model, images: Tensor) -> dict[str, Tensor]:
    """Group name -> standard deviation of the output of each filter after its norm ``[num_filters]``, on the CPU.

    A group whose conv is not called as a module is missing.
    """
    moments = {group.name: ChannelMoments(group.num_filters, device=model.device) for group in model.groups}

    def observe(group: FilterGroup, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        moments[group.name].update(_own(group, output))

    predict(_hooked(model, {group.name: partial(observe, group) for group in model.groups}), images, _BATCH)
    return {name: one.variance.sqrt().cpu() for name, one in moments.items() if one.count}


def _predict_raised(model: Model, shifts: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Labels ``[N]`` predicted with a number ``[num_filters]`` added to the output of every filter."""

    def shift(group: FilterGroup, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        raised = output.clone()
        own = _own(group, raised)
        own += shifts[group.name].to(own).view(1, -1, *[1] * (own.dim() - 2))
        return raised

    hooks = {group.name: partial(shift, group) for group in model.groups if group.name in shifts}
    return predict(_hooked(model, hooks), images, _BATCH)


def _own(group: FilterGroup, output: Tensor) -> Tensor:
    """The channels of a group in the output of its last layer."""
    start = group.norm.start if group.norm else 0
    return output[:, start : start + group.num_filters]


def _hooked(model: Model, hooks: Mapping[str, Callable[..., Tensor | None]]) -> nn.Module:
    """A copy of the model in eval mode, with a forward hook on the last layer of some groups."""
    module = model.clone().module.eval()
    network = module.get_submodule("network")
    for group in model.groups:
        if group.name in hooks:
            last_layer(network, group).register_forward_hook(hooks[group.name])
    return module
