"""Prunes filters of a model: sets their parameters to zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from bdprune.errors import OptionError
from bdprune.model.groups import FilterGroup
from bdprune.model.handle import Model

PruneMode = Literal["zero_gamma", "zero_gamma_beta", "weights"]
MODES: tuple[PruneMode, ...] = ("zero_gamma", "zero_gamma_beta", "weights")


def prune(model: Model, filters: Mapping[str, Sequence[int]], mode: PruneMode = "zero_gamma") -> Model:
    """A new model in which the given filters are pruned; does not change ``model``.

    Args:
        model: the model.
        filters: indices of filters by the name of their group.
        mode: ``zero_gamma`` sets the scale of the norm to zero, so the filter outputs the constant beta (RNP, ANP).
            ``zero_gamma_beta`` also sets the shift to zero, so it outputs zero (CLP). ``weights`` also sets the conv's
            filter and bias to zero, which also changes the statistics of a group or layer norm, and so its other
            channels; the first two modes change no other channel. If a filter has no norm of its own, every mode sets
            its conv's filter and bias to zero.

    Raises:
        OptionError: an unknown mode, group or filter.
    """
    check_pruning(model, filters, mode)
    pruned = model.clone()
    prune_(pruned.network, model.groups, filters, mode)
    return pruned


def check_pruning(model: Model, filters: Mapping[str, Sequence[int]], mode: PruneMode) -> None:
    """Raises the errors of ``prune``, and does nothing else."""
    if mode not in MODES:
        raise OptionError(f"Unknown pruning mode {mode!r}.", f"Choose one of {', '.join(MODES)}.")
    groups = {group.name: group for group in model.groups}
    for name, indices in filters.items():
        if name not in groups:
            known = ", ".join(list(groups)[:5])
            raise OptionError(f"The model has no filter group {name!r}.", f"Its groups are {known}, ...")
        _check(indices, groups[name])


def prune_(
    network: nn.Module, groups: Sequence[FilterGroup], filters: Mapping[str, Sequence[int]], mode: PruneMode
) -> None:
    """Does in place what ``prune`` does to a copy; does not check names and indices."""
    for group in groups:
        if group.name in filters:
            _cut(network, group, list(filters[group.name]), mode)


def _check(indices: Sequence[int], group: FilterGroup) -> None:
    wrong = [index for index in indices if not 0 <= index < group.num_filters]
    if wrong:
        raise OptionError(f"{group.name} has no filter {wrong[0]}.", f"Its filters are 0 to {group.num_filters - 1}.")


def pruned_parameters(network: nn.Module, group: FilterGroup, mode: PruneMode) -> list[tuple[nn.Parameter, int]]:
    """The parameters of ``network`` that pruning a filter of ``group`` sets to zero.

    Returns:
        Each parameter with the index of the group's first filter in its dimension 0.
    """
    norm = group.norm
    found: list[tuple[nn.Parameter | None, int]] = []
    if norm is None or mode == "weights":
        found += [(getattr(network.get_submodule(group.conv), name), 0) for name in ("weight", "bias")]
    if norm is not None:
        names = ("weight",) if mode == "zero_gamma" else ("weight", "bias")
        found += [(getattr(network.get_submodule(norm.name), name), norm.start) for name in names]
    return [(parameter, start) for parameter, start in found if parameter is not None]


@torch.no_grad()
def _cut(network: nn.Module, group: FilterGroup, indices: list[int], mode: PruneMode) -> None:
    for parameter, start in pruned_parameters(network, group, mode):
        parameter[[start + index for index in indices]] = 0
