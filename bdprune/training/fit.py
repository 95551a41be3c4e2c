"""The trainer that makes the zoo: SGD with a one-cycle schedule, crop and flip, bf16 where asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.training.augment import crop_and_flip


@dataclass(frozen=True)
class Schedule:
    """A training recipe.

    Args:
        epochs: passes over the data.
        batch_size: images a step.
        peak_lr: highest learning rate of the one-cycle schedule (Smith and Topin, 2017).
        warmup: share of all steps spent rising to the peak.
        momentum: Nesterov momentum.
        weight_decay: L2 penalty on all parameters.
        padding: pixels of the random crop.
        bf16: run the network under bfloat16 autocast.
    """

    epochs: int = 10
    batch_size: int = 128
    peak_lr: float = 0.2
    warmup: float = 0.25
    momentum: float = 0.9
    weight_decay: float = 5e-4
    padding: int = 4
    bf16: bool = True

    def steps(self, count: int) -> int:
        """Steps in all over ``count`` images; the odd ones at the end of an epoch's order are left out."""
        return self.epochs * (count // self.batch_size)


class Objective(Protocol):
    """What a training step minimises, with whatever is trained beside the network and how far that has come."""

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor, done: float) -> Tensor:
        """Loss of one step, a scalar.

        Args:
            network: images in [0, 1] -> logits, in train mode. Its gradients are the trainer's: they are cleared after
                this call and before the backward pass.
            images: ``[B, C, H, W]`` in [0, 1], augmented.
            labels: ``[B]`` int64.
            done: share of the schedule's steps that is done, in [0, 1).
        """

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs: tensors, numbers, strings, and lists and dicts of them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what ``state_dict`` gave."""


class CrossEntropy:
    """Plain cross-entropy."""

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor, done: float) -> Tensor:
        return functional.cross_entropy(network(images).float(), labels)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is nothing to take up."""


def fit(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    schedule: Schedule,
    seed: int,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    objective: Objective | None = None,
) -> None:
    """Trains ``network`` in place.

    Args:
        network: images in [0, 1] -> logits.
        images: ``[N, C, H, W]`` uint8, values 0-255.
        labels: ``[N]`` int64.
        seed: of order and augmentation; the same seed, threads and machine give the same weights.
        progress: called after every step with (steps done, steps in all, loss).
        objective: what is minimised, called under the schedule's autocast; cross-entropy by default.
    """
    objective = objective or CrossEntropy()
    device = next(network.parameters()).device
    network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(seed)
    steps = schedule.steps(len(images))
    optimizer = torch.optim.SGD(
        network.parameters(), schedule.peak_lr, schedule.momentum, weight_decay=schedule.weight_decay, nesterov=True
    )
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.peak_lr, total_steps=steps, pct_start=schedule.warmup, cycle_momentum=False
    )
    done = 0
    for _ in range(schedule.epochs):
        order = torch.randperm(len(images), generator=generator)
        for index in order[: len(order) // schedule.batch_size * schedule.batch_size].split(schedule.batch_size):
            batch = crop_and_flip(images[index], generator, schedule.padding).to(device).float() / 255
            with torch.autocast(device.type, torch.bfloat16, enabled=schedule.bf16):
                loss = objective.loss(network, batch, labels[index].to(device), done / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            done += 1
            progress(done, steps, loss.item())
    optimizer.zero_grad()
    network.eval()
