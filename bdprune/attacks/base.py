"""What an attack is. Attacks exist to make models of known truth, for tests and zoos."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Attack(Protocol):
    """A data-poisoning attack with one target label.

    ``apply`` adds the full-strength trigger to images ``[N, C, H, W]`` in [0, 1]; ``poison`` does so to a seeded
    share of a training set and relabels it.
    """

    @property
    def target(self) -> int: ...

    def apply(self, images: Tensor) -> Tensor: ...

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]: ...
