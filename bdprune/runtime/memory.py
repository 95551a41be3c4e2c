"""Memory that a model needs in training."""

from __future__ import annotations

import torch
from torch import Tensor

from bdprune.model import Model, StackedNetwork

_COPIES = 8  # weights in the stack, gradients, momenta, new weights and momenta, and intermediate values
_MAPS = 2  # the maps kept for the backward pass, and as much again for gradients and temporary maps
_PROBE = 2  # images: batch norms cannot train on a single image


def footprint(model: Model, batch_size: int) -> int:
    """Bytes that ``model`` adds to a stack which trains on ``batch_size`` images a step, 0 for no training: a high
    estimate.

    Measures the feature maps that a backward pass needs in a forward pass of a few images on the model's device.
    """
    weights = weight_bytes(model)
    if not batch_size:
        return 2 * weights
    stacked = StackedNetwork([model]).train()
    own = {value.data_ptr() for value in [*stacked.parameters(), *stacked.buffers()]}
    maps: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        if value.data_ptr() not in own:
            maps[value.data_ptr()] = value.nbytes
        return value

    images = torch.zeros(_PROBE, *model.input_shape, device=model.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        logits = stacked(images)
    kept: int = sum(maps.values()) + logits.nbytes
    return _COPIES * weights + _MAPS * kept * batch_size // _PROBE


def weight_bytes(model: Model) -> int:
    """Bytes of all parameters and buffers."""
    return sum(value.nbytes for value in model.network.state_dict().values())
