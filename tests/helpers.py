"""Helpers for the tests of several packages."""

from __future__ import annotations

import copy

import torch

from bdprune.model.handle import Model


def siblings(model: Model, count: int = 3, scale: float = 0.05, device: str = "cpu") -> list[Model]:
    """The model, and others of its architecture whose weights have added noise of this standard deviation."""
    found = [model]
    for seed in range(1, count):
        network = copy.deepcopy(model.network)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
        found.append(model.with_network(network))
    return [one.with_network(copy.deepcopy(one.network).to(device)) for one in found]


def broken(model: Model, value: float = float("nan")) -> Model:
    """A copy whose loss is not a finite number."""
    network = copy.deepcopy(model.network)
    with torch.no_grad():
        next(network.parameters())[0] = value
    return model.with_network(network)
