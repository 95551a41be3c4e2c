"""Feature shift tuning: a new head that must differ from the old one moves the features (FST, NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.loops.finetune import TuningObjective


class FeatureShift(TuningObjective):
    """Cross-entropy + alpha <W, W0>, for a head W that starts anew, and keeps the norm of the old head W0.

    The features must move with the new head, and features that only the backdoor uses get no gradient on clean images.

    Args:
        path: name of the head, a linear layer, in the network (:func:`bdprune.model.find_head`).
        alpha: factor of the inner product with the old head, at least 0.
        seed: seed for the new head.

    Source: Min et al., Towards Stable Backdoor Purification through Feature Shift Tuning, NeurIPS 2023.
    """

    def __init__(self, path: str, alpha: float, seed: int = 0) -> None:
        self._path, self._alpha, self._seed = path, alpha, seed

    @torch.no_grad()
    def start(self, module: nn.Module) -> None:
        """Replaces the head by a random one with the same norm; weights and bias are uniform, as in a new layer."""
        head = module.get_submodule(f"network.{self._path}")
        assert isinstance(head, nn.Linear)
        self._weight, self._old = head.weight, head.weight.detach().clone()
        generator = torch.Generator().manual_seed(self._seed)
        bound = head.in_features**-0.5
        for parameter in head.parameters():
            drawn = torch.rand(parameter.shape, generator=generator)
            parameter.copy_((2 * drawn - 1) * bound)
        self.after_step()

    def backward(self, run: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        alike = (self._weight * self._old).sum()
        loss = functional.cross_entropy(run(images), labels) + self._alpha * alike
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def after_step(self) -> None:
        """Scales the head back to the norm of the old one."""
        self._weight.mul_(self._old.norm() / self._weight.norm().clamp(min=1e-12))
