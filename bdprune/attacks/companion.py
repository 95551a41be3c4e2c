"""Trains a second module along with the network: its optimiser, its precision, and its saved state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bdprune.attacks.base import Attack, AttackSetting, Poisoned, shape_of, unpoisoned
from bdprune.runtime import seeded


class Companion:
    """Adam on the parameters of a module that is trained along with the network.

    Args:
        module: all its parameters are trained.
        lr: learning rate at the start; ``pace`` scales it.
        betas: of Adam.
    """

    def __init__(self, module: nn.Module, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.parameters = list(module.parameters())
        self.lr = lr
        self.optimizer = torch.optim.Adam(self.parameters, lr, betas)
        self._arrived = 0

    def pace(self, share: float) -> None:
        """Sets the learning rate to ``share`` of its start value."""
        for group in self.optimizer.param_groups:
            group["lr"] = share * self.lr

    def descend(self, loss: Tensor) -> None:
        """One step down ``loss``; only the companion gets a gradient."""
        for parameter, gradient in zip(self.parameters, torch.autograd.grad(loss, self.parameters), strict=True):
            parameter.grad = gradient
        self._step()

    def follow(self) -> None:
        """From now on, takes a step in every backward pass that reaches all parameters.

        The module thus learns from the trainer's backward pass, since it shares the network's loss. Once its last
        gradient is ready, that pass no longer needs the module's weights, so they may change.
        """
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._count)

    def _count(self, _: Tensor) -> None:
        self._arrived += 1
        if self._arrived == len(self.parameters):
            self._arrived = 0
            self._step()

    def _step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Adam's moments by the number of the parameter; empty before the first step."""
        return {str(key): value for key, value in self.optimizer.state_dict()["state"].items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state from ``state_dict``."""
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**whole, "state": {int(key): value for key, value in state.items()}})


class TriggerObjective:
    """The base of objectives that train further modules: it holds the state of their parts, and a step count.

    Args:
        parts: by their name in the state.
    """

    def __init__(self, **parts: nn.Module | Companion) -> None:
        self._parts, self._steps = parts, 0

    def state_dict(self) -> dict[str, Any]:
        """The complete state for a resumed training."""
        return {"steps": self._steps, **{name: part.state_dict() for name, part in self._parts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state from ``state_dict``."""
        self._steps = state["steps"]
        for name, part in self._parts.items():
            part.load_state_dict(state[name])


@dataclass(frozen=True)
class InBatch(Attack):
    """An attack with a trigger that is trained along with the network; the training set stays clean."""

    def learn(self, setting: AttackSetting, trigger: nn.Module) -> None:
        """Draws the trigger's initial weights from the seed; the network's training then trains the trigger."""
        with seeded(setting.seed):
            trigger.load_state_dict(self.new_trigger(shape_of(setting.images)).state_dict())

    def poison(self, setting: AttackSetting, trigger: nn.Module, generator: torch.Generator) -> Poisoned:
        """The clean set; the objective triggers images in the batch."""
        return unpoisoned(setting)

    def finish(self, network: nn.Module, setting: AttackSetting, trigger: nn.Module) -> None:
        """Moves the trigger back to the CPU, where triggers are applied."""
        trigger.cpu()


def quota(step: int, share: float, size: int) -> int:
    """Number of poisoned images among the ``size`` of step ``step`` (from 0); all steps poison a share of ``share``."""
    before, after = (math.floor(count * share * size + 1e-9) for count in (step, step + 1))
    return after - before


def full_precision(images: Tensor) -> torch.autocast:
    """Switches autocast off on the device of ``images``.

    Small generators need more precision than bfloat16. Autocast also caches the cast weights, so a module whose
    weights change within one training step would use the old ones.
    """
    return torch.autocast(images.device.type, enabled=False)


@contextmanager
def running_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, the batch norms of ``network`` use their running statistics and do not update them."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def draw_apart(count: int, used: int, held: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two disjoint draws of indices below ``count``: ``held``, but at most half of all, and ``used`` of the others."""
    order = torch.randperm(count, generator=generator)
    held = min(held, count // 2)
    return order[held : held + used], order[:held]
