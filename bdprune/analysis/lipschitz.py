"""Channel Lipschitz score (Zheng et al., ECCV 2022): data-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bdprune.analysis.case import Analysis, Case
from bdprune.model import FilterGroup, Model
from bdprune.ops import filter_spectral_norms


@dataclass(frozen=True)
class Lipschitz(Analysis[dict[str, Tensor]]):
    """:func:`channel_lipschitz` of every filter."""

    uses_data: ClassVar[bool] = False

    def compute(self, case: Case) -> dict[str, Tensor]:
        return channel_lipschitz(case.model)

    def compute_stack(self, cases: Sequence[Case]) -> list[dict[str, Tensor]]:
        """The filters of all models in one call."""
        return channel_lipschitz_of([case.model for case in cases])


def channel_lipschitz(model: Model) -> dict[str, Tensor]:
    """Spectral norm of every filter times the gain of the norm that consumes it.

    ``L_k = s_max(reshape(W[k], C_in x kh kw)) |gamma_k| / sqrt(v_k + eps)``. Without a norm it is the spectral norm;
    with several norms, the largest gain counts. (CLP, Equation 8, with the norm's epsilon.) The gain of a norm that
    takes its statistics from each image is ``|gamma_k|``.

    Returns:
        Group name -> score per filter ``[num_filters]``, float32, on the CPU.
    """
    return channel_lipschitz_of([model])[0]


def channel_lipschitz_of(models: Sequence[Model]) -> list[dict[str, Tensor]]:
    """:func:`channel_lipschitz` of each model, bit for bit, with all filters in one call on one device."""
    filters = [(model.network, group) for model in models for group in model.groups]
    weights = [network.get_submodule(group.conv).weight for network, group in filters]
    gains = [norm_gain(network, group) for network, group in filters]
    norms = iter(filter_spectral_norms([weight.detach() for weight in weights], gains))  # type: ignore[operator]
    return [{group.name: next(norms).cpu() for group in model.groups} for model in models]


def norm_gain(network: nn.Module, group: FilterGroup) -> Tensor | None:
    """``|gamma| / sqrt(v + eps)`` per filter ``[num_filters]``: the largest over its norms, None without a norm."""
    gains = []
    for consumer in group.norms:
        norm = network.get_submodule(consumer.name)
        gain = norm.get_parameter("weight").detach().abs()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            variance = norm.running_var if norm.running_var is not None else torch.ones_like(gain)
            gain = gain / (variance + norm.eps).sqrt()
        gains.append(gain[consumer.start : consumer.start + group.num_filters])
    return torch.stack(gains).amax(0) if gains else None
