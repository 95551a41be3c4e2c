"""The trainer that makes the zoo: SGD with a one-cycle or a step schedule, crop and flip, optional bf16."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from bdprune.data import RawImages
from bdprune.errors import OptionError, TrainingError
from bdprune.loops.resume import Checkpoint, digest
from bdprune.runtime import autocast, computes_bfloat16, convs_of, crop_and_flip, laid_out, seeded, training_layout

_RANGES = "Give a peak_lr above 0, a warmup from 0 to below 1, a momentum between 0 and 1, and no value below 0."


@dataclass(frozen=True)
class Schedule:
    """A training recipe.

    Args:
        epochs: passes over the data.
        batch_size: images in one step.
        peak_lr: highest learning rate; with steps, the first one.
        warmup: share of all steps in which one cycle rises to the peak.
        momentum: Nesterov momentum.
        weight_decay: L2 penalty on all parameters.
        padding: pixels of the random crop.
        bf16: run the network under bfloat16 autocast, if the machine computes in bfloat16. Otherwise 3x3 convs use
            Winograd's algorithm if that is faster.
        policy: schedule of the learning rate. "one-cycle" (Smith and Topin, 2017) rises to the peak and falls to zero.
            "steps" multiplies it by ``decay`` at every milestone (the papers: 200 epochs, 0.1, a tenth at 60 and 120).
        milestones: epochs, counted from 0, at whose start the rate is multiplied.
        decay: factor at each milestone.
        flip: mirror half of the images; unsuitable if mirroring changes the class, as for traffic signs.

    Raises:
        OptionError: no epochs, no images in a step, or a number outside its range.
    """

    epochs: int = 10
    batch_size: int = 128
    peak_lr: float = 0.2
    warmup: float = 0.25
    momentum: float = 0.9
    weight_decay: float = 5e-4
    padding: int = 4
    bf16: bool = True
    policy: Literal["one-cycle", "steps"] = "one-cycle"
    milestones: tuple[int, ...] = (60, 120)
    decay: float = 0.1
    flip: bool = True

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1:
            raise OptionError(
                f"A schedule needs at least 1 epoch and 1 image a step, not {self.epochs} and {self.batch_size}.",
                "Give at least 1 of both.",
            )
        ranges = {
            "peak_lr": 0 < self.peak_lr < math.inf,
            "warmup": 0 <= self.warmup < 1,
            "momentum": 0 < self.momentum < 1,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "padding": self.padding >= 0,
            "decay": 0 <= self.decay < math.inf,
        }
        for name, fits in ranges.items():
            if not fits:
                raise OptionError(f"The schedule's {name} is out of range: {getattr(self, name)}.", _RANGES)

    def steps(self, count: int) -> int:
        """Total steps over ``count`` images; drops the incomplete batch at the end of an epoch."""
        return self.epochs * (count // self.batch_size)


class Objective(Protocol):
    """The loss that a training step minimises, with its own state and any parameters trained besides the network."""

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor, done: float) -> Tensor:
        """Loss of one step, a scalar.

        Args:
            network: images in [0, 1] -> logits, in train mode. The trainer owns its gradients: it clears them after
                this call and before the backward pass.
            images: ``[B, C, H, W]`` in [0, 1], augmented.
            labels: ``[B]`` int64.
            done: share of the schedule's steps completed, in [0, 1).
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs: tensors, numbers, strings, and lists and dicts of them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state from ``state_dict``."""


class CrossEntropy:
    """Plain cross-entropy."""

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor, done: float) -> Tensor:
        return functional.cross_entropy(network(images).float(), labels)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def fit(
    network: nn.Module,
    train: RawImages,
    schedule: Schedule,
    seed: int,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    objective: Objective | None = None,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Trains ``network`` in place, on its device.

    Seeds global randomness, which dropout uses, and restores it after the training.

    Args:
        network: images in [0, 1] -> logits.
        train: the training set.
        seed: seed for order, augmentation and dropout; the same seed, threads and machine give the same weights.
        progress: called after every step with (steps done, steps in all, loss).
        objective: loss to minimise, called under the schedule's autocast; cross-entropy by default.
        checkpoint: written during training and at the end. A checkpoint of the same training is resumed after its last
            step, and leads to the same weights as a training without interruption.

    Raises:
        OptionError: there are fewer images than one step needs.
        TrainingError: the loss is not finite.
        OutputError: the checkpoint cannot be written.
    """
    count = len(train.labels)
    steps = schedule.steps(count)
    if not steps:
        hint = "Give a smaller batch size."
        raise OptionError(f"{count} images are less than one step of {schedule.batch_size}.", hint)
    with seeded(seed), _deterministic():
        kept = checkpoint.load(_recipe(network, train, schedule, seed)) if checkpoint else None
        run = _Run(network, objective or CrossEntropy(), schedule, steps, seed)
        if kept is not None:
            run.load_state_dict(kept)
        images, labels = train.images.to(run.device), train.labels.to(run.device)
        while run.done < steps:
            loss = run.step(images, labels)
            progress(run.done, steps, loss)
            if checkpoint and (checkpoint.due() or run.done == steps):
                checkpoint.save(run.state_dict())
    network.zero_grad()
    network.eval()


@contextmanager
def _deterministic() -> Iterator[None]:
    """Makes cuDNN deterministic but keeps it enabled: ``cudnn.flags`` would disable it."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


class _Run:
    """A training in progress: all state that changes from step to step.

    Attributes:
        done: steps done.
        device: device of the network.
    """

    def __init__(self, network: nn.Module, objective: Objective, schedule: Schedule, steps: int, seed: int) -> None:
        self.done = 0
        self.device = next(network.parameters()).device
        self._generator = torch.Generator().manual_seed(seed)
        self._layout = training_layout(network)
        self._winograd = self._layout is torch.channels_last and self.device.type == "cpu"
        network.to(memory_format=self._layout).train()  # type: ignore[call-overload]
        self._network, self._objective, self._schedule, self._steps = network, objective, schedule, steps
        self._optimizer = torch.optim.SGD(
            network.parameters(), schedule.peak_lr, schedule.momentum, weight_decay=schedule.weight_decay, nesterov=True
        )
        self._rate = _scheduler(self._optimizer, schedule, steps)
        self._epoch_start = self._generator.get_state()
        self._order: tuple[Tensor, ...] = ()

    def _next_batch(self, count: int) -> Tensor:
        """Indices of the next step's images, out of ``count``; every epoch has its own order."""
        position = self.done % (self._steps // self._schedule.epochs)
        if position == 0:
            self._epoch_start = self._generator.get_state()
            self._order = self._draw_order(count)
        elif not self._order:  # resumed in the middle of an epoch
            now = self._generator.get_state()
            self._generator.set_state(self._epoch_start)
            self._order = self._draw_order(count)
            self._generator.set_state(now)
        return self._order[position]

    def _draw_order(self, count: int) -> tuple[Tensor, ...]:
        order, size = torch.randperm(count, generator=self._generator), self._schedule.batch_size
        return tuple(order[: count // size * size].split(size))

    def step(self, images: Tensor, labels: Tensor) -> float:
        """One step on the next batch of a training set on the device; returns its loss."""
        schedule, index = self._schedule, self._next_batch(len(images))
        pixels = crop_and_flip(images[index], self._generator, schedule.padding, schedule.flip)
        batch = laid_out(pixels.float() / 255, self._layout)
        with convs_of("winograd" if self._winograd else "float32"):
            return self._descend(batch, labels[index])

    def _descend(self, batch: Tensor, labels: Tensor) -> float:
        with autocast(self.device, self._schedule.bf16):
            loss = self._objective.loss(self._network, batch, labels, self.done / self._steps)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._rate.step()
        self.done += 1
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"The loss is {value} after {self.done} steps.", "Lower the learning rate.")
        return value

    def state_dict(self) -> dict[str, Any]:
        return {
            "done": self.done,
            "network": self._network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rate": self._rate.state_dict(),
            "objective": self._objective.state_dict(),
            "generator": self._generator.get_state(),
            "epoch_start": self._epoch_start,
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        self._network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rate.load_state_dict(state["rate"])
        self._objective.load_state_dict(state["objective"])
        self._generator.set_state(state["generator"])
        self._epoch_start = state["epoch_start"]
        torch.set_rng_state(state["random"])
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], self.device)


def _scheduler(optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int) -> LRScheduler:
    if schedule.policy == "one-cycle":
        # Starts at the peak if the rise is one step: torch would divide by zero.
        warmup = 0.0 if schedule.warmup * steps == 1 else schedule.warmup
        return OneCycleLR(optimizer, schedule.peak_lr, total_steps=steps, pct_start=warmup, cycle_momentum=False)
    an_epoch = steps // schedule.epochs
    return LambdaLR(
        optimizer, lambda step: schedule.decay ** sum(step >= an_epoch * epoch for epoch in schedule.milestones)
    )


def machine() -> tuple[object, ...]:
    """The properties of the machine that determine the weights: torch version, threads, instruction set."""
    bfloat16 = computes_bfloat16(torch.device("cpu"))
    return torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), bfloat16


def _recipe(network: nn.Module, train: RawImages, schedule: Schedule, seed: int) -> str:
    """A digest of everything that determines the weights, except the objective."""
    device = next(network.parameters()).device.type
    return digest(network.state_dict(), train.images, train.labels, schedule, seed, device, machine())
