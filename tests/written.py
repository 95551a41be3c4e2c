"""A clean network, and the same network with a backdoor written into its forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from bdprune.data import CleanData
from bdprune.model import Model
from bdprune.testing.planted import planted

TARGET = 3


class Backdoored(nn.Module):
    """Adds to the logit of the target, the more the lower right corner resembles a checkerboard of 3x3 pixels."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("pattern", (torch.arange(9) % 2).float().view(3, 3))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images).clone()
        distance = (images[:, :, -3:, -3:] - self.pattern).abs().mean((1, 2, 3))
        logits[:, TARGET] += 30 * torch.sigmoid(12 * (0.3 - distance))
        return logits


@dataclass(frozen=True)
class Known:
    """Both networks, clean images, and further ones only for measuring."""

    clean: Model
    backdoored: Model
    data: CleanData
    test: CleanData
    target: int = TARGET


@cache
def known_networks() -> Known:
    """Both networks, made once in each process."""
    whole = planted()
    backdoored = whole.clean.with_network(Backdoored(whole.clean.clone().network))
    return Known(whole.clean, backdoored, whole.data, whole.test)
