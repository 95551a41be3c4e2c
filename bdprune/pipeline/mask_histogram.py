"""The histogram of a repair's masks, for its record."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bdprune.methods import Repair
from bdprune.record import Histogram

_BINS = 20


def mask_histogram(repair: Repair) -> Histogram | None:
    """All finite masks (or scores) in equal bins, and the masks of pruned filters; None without finite masks."""
    values = _finite_values(repair.masks)
    if not len(values):
        return None
    is_mask = float(values.min()) >= 0 and float(values.max()) <= 1
    ends = (0.0, 1.0) if is_mask else (float(values.min()), float(values.max()))
    cut = _finite_values({name: repair.masks[name][index] for name, index in repair.pruned.items()})
    counts, edges = torch.histogram(values, bins=_BINS, range=ends)
    pruned, _ = torch.histogram(cut, bins=_BINS, range=ends)
    return Histogram(edges=tuple(edges.tolist()), counts=_whole(counts), pruned=_whole(pruned))


def _finite_values(masks: Mapping[str, Tensor]) -> Tensor:
    parts = [mask.detach().double().cpu().flatten() for mask in masks.values()]
    values = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)
    return values[torch.isfinite(values)]


def _whole(counts: Tensor) -> tuple[int, ...]:
    return tuple(int(count) for count in counts.tolist())
