"""Cuts filters out of a model by setting what makes them to zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from bdprune.errors import OptionError
from bdprune.model.groups import FilterGroup
from bdprune.model.handle import Model

PruneMode = Literal["zero_gamma", "zero_gamma_beta", "weights"]
MODES: tuple[PruneMode, ...] = ("zero_gamma", "zero_gamma_beta", "weights")


def prune(model: Model, filters: Mapping[str, Sequence[int]], mode: PruneMode = "zero_gamma") -> Model:
    """A new model in which the given filters are pruned; ``model`` stays as it is.

    Args:
        model: the model.
        filters: indices of filters by the name of their group.
        mode: ``zero_gamma`` sets the scale of the norm to zero, so that the filter gives the constant beta (RNP, ANP);
            ``zero_gamma_beta`` the shift too, so that it gives zero (CLP); ``weights`` the conv's filter and bias too.
            Filters without a norm of their own always lose the conv's filter and bias.

    Raises:
        OptionError: an unknown mode, group or filter.
    """
    if mode not in MODES:
        raise OptionError(f"The pruning mode is {mode!r}.", f"Choose one of {', '.join(MODES)}.")
    groups = {group.name: group for group in model.groups}
    for name, indices in filters.items():
        if name not in groups:
            known = ", ".join(list(groups)[:5])
            raise OptionError(f"The model has no filter group {name!r}.", f"Its groups are {known}, ...")
        _check(indices, groups[name])
    pruned = model.clone()
    prune_(pruned.network, model.groups, filters, mode)
    return pruned


def prune_(
    network: nn.Module, groups: Sequence[FilterGroup], filters: Mapping[str, Sequence[int]], mode: PruneMode
) -> None:
    """Does to ``network`` in place what ``prune`` does to a copy; names and indices are taken as right."""
    for group in groups:
        if group.name in filters:
            _cut(network, group, list(filters[group.name]), mode)


def _check(indices: Sequence[int], group: FilterGroup) -> None:
    wrong = [index for index in indices if not 0 <= index < group.num_filters]
    if wrong:
        raise OptionError(f"{group.name} has no filter {wrong[0]}.", f"Its filters are 0 to {group.num_filters - 1}.")


@torch.no_grad()
def _cut(network: nn.Module, group: FilterGroup, indices: list[int], mode: PruneMode) -> None:
    norm = group.norm
    if norm is None or mode == "weights":
        _zero(network, group.conv, ("weight", "bias"), indices)
    if norm is not None:
        channels = [norm.start + index for index in indices]
        _zero(network, norm.name, ("weight",) if mode == "zero_gamma" else ("weight", "bias"), channels)


def _zero(network: nn.Module, module: str, names: Sequence[str], indices: list[int]) -> None:
    parameters: list[Tensor | None] = [getattr(network.get_submodule(module), name) for name in names]
    for parameter in parameters:
        if parameter is not None:
            parameter[indices] = 0
