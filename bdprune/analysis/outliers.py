"""How far a filter's score stands out of its layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def layer_z_scores(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``(score - mean) / std`` within each layer, unbiased standard deviation as in CLP.

    A layer with fewer than three filters, or with equal scores, gets zeros: nothing in it can stand out.
    """
    return {name: _z(score.double()) for name, score in scores.items()}


def _z(score: Tensor) -> Tensor:
    if len(score) < 3:
        return torch.zeros_like(score)
    spread = score.std()
    return torch.zeros_like(score) if spread == 0 else (score - score.mean()) / spread
