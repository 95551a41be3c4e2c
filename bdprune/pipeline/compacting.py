"""Removes the pruned filters of a repaired model, and measures the result."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from bdprune.methods import Repair
from bdprune.model import compact
from bdprune.record import CompactInfo, number
from bdprune.runtime import flops, milliseconds

_BATCH = 64  # images of a timed pass


def compacted(repair: Repair, images: Tensor) -> tuple[Repair, CompactInfo]:
    """The repair with the pruned filters removed where that changes no logit, and what it saves.

    Args:
        repair: a repair whose pruned filters are still in the network.
        images: ``[N, C, H, W]`` in [0, 1]; on them the logits are compared, and the time is measured.

    Raises:
        OptionError: Torch-Pruning is not installed.
    """
    found = compact(repair.model, repair.pruned, images)
    whole, small = repair.model.module, found.model.module
    batch = images[:_BATCH].to(repair.model.device)
    before, after = milliseconds([whole, small], batch)
    info = CompactInfo(
        filters_removed=found.removed,
        parameters_before=_parameters(whole),
        parameters_after=_parameters(small),
        flops_before=flops(whole, batch[:1]),
        flops_after=flops(small, batch[:1]),
        ms_before=number(before),
        ms_after=number(after),
        difference=number(found.difference),
        whole=tuple(f"{name}: {reason}" for name, reason in found.left.items()),
    )
    return replace(repair, model=found.model), info


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
