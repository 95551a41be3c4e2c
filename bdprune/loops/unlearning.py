"""Unlearning: gradient ascent on clean data until the network is no better than chance (RNP, Algorithm 1).

The trajectory shows which label the wrong predictions concentrate on (RNP, Section 4.3).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from bdprune.data import CleanData
from bdprune.errors import TrainingError
from bdprune.model import Model
from bdprune.record import check_settings
from bdprune.runtime import (
    DEFAULT,
    Budget,
    Plan,
    Precision,
    Trained,
    clean_accuracy,
    epochs,
    mean_losses,
    only,
    passes,
    plan_for,
    seeded,
    trainer_for,
)


@dataclass(frozen=True)
class UnlearnStep:
    """The network's predictions for a batch, in train mode, before the step on that batch.

    Attributes:
        loss: mean cross-entropy.
        accuracy: share of right predictions, in [0, 1].
        votes: how many images were predicted as each label.
        wrong_votes: the same without right predictions.
        label_counts: how many images have each label.
    """

    loss: float
    accuracy: float
    votes: tuple[int, ...]
    wrong_votes: tuple[int, ...]
    label_counts: tuple[int, ...]


def flip_shares(steps: Sequence[UnlearnStep]) -> list[float]:
    """For every label k, the share of the images of other classes that were predicted as k, in [0, 1], ``[K]``."""
    shares = []
    for label in range(len(steps[0].votes)):
        others = sum(sum(step.label_counts) - step.label_counts[label] for step in steps)
        shares.append(sum(step.wrong_votes[label] for step in steps) / others if others else 0.0)
    return shares


def last_epoch(trajectory: Sequence[UnlearnStep], steps_per_epoch: int) -> Sequence[UnlearnStep]:
    """The steps of the last pass over the data, complete or not: the collapse."""
    return trajectory[-steps_per_epoch:]


def halves(trajectory: Sequence[UnlearnStep]) -> tuple[Sequence[UnlearnStep], Sequence[UnlearnStep]]:
    """The first and the second half of the steps up to the collapse; with an odd number, the second is one longer.

    Neither is empty: a single step is in both.
    """
    middle = len(trajectory) // 2
    return trajectory[: max(middle, 1)], trajectory[middle:]


def middle_half(trajectory: Sequence[UnlearnStep]) -> Sequence[UnlearnStep]:
    """The steps up to the collapse without their first and last quarter, each rounded down to whole steps."""
    quarter = len(trajectory) // 4
    return trajectory[quarter : len(trajectory) - quarter]


def mean_shares(runs: Sequence[Sequence[float]]) -> list[float]:
    """The mean over runs of the share of every label, ``[K]``."""
    return [sum(of_label) / len(runs) for of_label in zip(*runs, strict=True)]


def sink_label(trajectory: Sequence[UnlearnStep], steps_per_epoch: int) -> int:
    """The label with the largest flip share in the last pass: RNP's backdoor label."""
    return top_label(flip_shares(last_epoch(trajectory, steps_per_epoch)))


def top_label(shares: Sequence[float]) -> int:
    """The label with the largest share; the smallest such label if there is a tie."""
    return max(range(len(shares)), key=lambda label: shares[label])


def leaders(shares: Sequence[float]) -> tuple[int, int]:
    """The labels with the largest and the second largest share; in a tie the smaller label comes first."""
    first, second = sorted(range(len(shares)), key=lambda label: -shares[label])[:2]
    return first, second


@dataclass(frozen=True)
class UnlearnSettings:
    """How to unlearn.

    Args:
        lr: learning rate of the first attempt.
        momentum: SGD momentum.
        weight_decay: L2 penalty; it keeps shrinking the weights while the loss rises.
        batch_size: images in one step.
        max_epochs: maximum number of passes over the data.
        stop_accuracy: stop once train-mode accuracy is at or below this, in [0, 1]; None means chance, 1 / K.
        stop_share: stop at this share of the accuracy before unlearning, in (0, 1); None uses stop_accuracy.
        stop_on: measure that accuracy over the last ``batch`` or the whole ``epoch``.
        milestones: epochs after which the learning rate is divided by ten.
        padding: pixels of the random crop; half of the images are also mirrored.
        small_data: below this number of images, batch norms use their running statistics and do not update them.
        retries: maximum number of new attempts, at a tenth of the learning rate, after a loss that is not finite.
        min_steps: start over at a third of the learning rate if the stop accuracy is reached in fewer steps: a network
            that collapses in a few steps gives no useful trajectory. 0 accepts any number.
        raises: maximum number of new attempts, at three times the learning rate, if the stop accuracy is not reached
            within max_epochs.

    Raises:
        OptionError: a setting is out of range.
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-2
    batch_size: int = 128
    max_epochs: int = 20
    stop_accuracy: float | None = None
    stop_share: float | None = None
    stop_on: Literal["batch", "epoch"] = "batch"
    milestones: tuple[int, ...] = ()
    padding: int = 4
    small_data: int = 64
    retries: int = 5
    min_steps: int = 0
    raises: int = 0

    def __post_init__(self) -> None:
        least = {"momentum": 0, "weight_decay": 0, "batch_size": 1, "max_epochs": 1, "padding": 0, "retries": 0}
        check_settings(self, {**least, "min_steps": 0, "raises": 0}, above={"lr": 0})


@dataclass(frozen=True)
class Unlearned:
    """An unlearned model and its trajectory.

    Attributes:
        model: the unlearned model, at its last finite state.
        trajectory: one entry a step.
        steps_per_epoch: number of steps in one pass over the data.
        lr: learning rate of the last attempt.
        stopped: whether the stop accuracy was reached.
        plan: number format and memory layout of the steps.
        half_way: the model after the first step whose accuracy was at most six tenths of that of the first step; None
            if it stayed higher.
    """

    model: Model
    trajectory: tuple[UnlearnStep, ...]
    steps_per_epoch: int
    lr: float
    stopped: bool
    plan: Plan = field(default_factory=Plan)
    half_way: Model | None = None


_HALF_WAY = 0.6
"""Share of the first accuracy where backdoor filters have moved, and others less (docs/explanation/unlearning.md)."""


_NO_LIMIT = Budget()


def unlearn(
    model: Model,
    data: CleanData,
    settings: UnlearnSettings,
    seed: int = 0,
    precision: Precision = DEFAULT,
    budget: Budget = _NO_LIMIT,
) -> Unlearned:
    """Maximises cross-entropy on ``data`` over all parameters of a copy of ``model``.

    Starts at the learning rate of ``settings``, which also say when to start over with another one. The result is the
    last finite state of the last attempt.

    Args:
        precision: see :func:`bdprune.runtime.plan_for`.
        budget: its deadline limits the time.

    Raises:
        BudgetError: the time does not suffice.
        OptionError: an unknown precision.
        TrainingError: no step of the last attempt was finite.
    """
    return only(unlearn_stack([model], data, settings, seed, precision, budget))


def unlearn_stack(
    models: Sequence[Model],
    data: CleanData,
    settings: UnlearnSettings,
    seed: int = 0,
    precision: Precision = DEFAULT,
    budget: Budget = _NO_LIMIT,
) -> list[Unlearned | TrainingError]:
    """The result of :func:`unlearn` for each model, or its error; several models share their steps.

    Models that need another attempt share it, each at its own learning rate.

    Raises:
        BudgetError: the time does not suffice; no model then has a result.
        OptionError: an unknown precision.
        ValueError: the models cannot be stacked.
    """
    results: dict[int, Unlearned | TrainingError] = {}
    pending = {index: _Attempt(settings.lr, settings.retries, settings.raises) for index in range(len(models))}
    stop_accuracies = [_stop_accuracy(model, data, settings) for model in models]
    trainer, few = trainer_for(models), len(data) < settings.small_data
    while pending:
        tried = list(pending)
        some = [models[index] for index in tried]
        ascent = _Ascent(trainer(some, few), settings, [stop_accuracies[index] for index in tried], budget)
        rates = [pending[index].lr for index in tried]
        with seeded(seed):
            outcomes = ascent.run(some, data, rates, seed, precision)
        for index, outcome in zip(tried, outcomes, strict=True):
            attempt = pending.pop(index).after(*outcome, settings.min_steps)
            if attempt:
                pending[index] = attempt
            else:
                results[index] = outcome[0] if outcome[0].trajectory else _no_finite_step(outcome[0].lr)
    return [results[index] for index in range(len(models))]


def _no_finite_step(lr: float) -> TrainingError:
    return TrainingError(
        f"The loss of unlearning is not finite at learning rate {lr:g}.",
        "Check the checkpoint's weights and the images, or set a smaller learning rate.",
    )


def _stop_accuracy(model: Model, data: CleanData, settings: UnlearnSettings) -> float:
    """The accuracy, in [0, 1], at which unlearning ``model`` stops."""
    if settings.stop_share is not None:
        return settings.stop_share * clean_accuracy(model.module, data.images, data.labels)
    return settings.stop_accuracy if settings.stop_accuracy is not None else 1 / model.num_classes


@dataclass(frozen=True)
class _Attempt:
    """One attempt for a model: its learning rate, and how often that may still be lowered and raised."""

    lr: float
    retries: int
    raises: int

    def after(self, result: Unlearned, finite: bool, min_steps: int) -> _Attempt | None:
        """The next attempt, None if the last one counts."""
        if not finite and self.retries:
            return _Attempt(self.lr / 10, self.retries - 1, 0)
        if finite and result.stopped and len(result.trajectory) < min_steps and self.retries:
            return _Attempt(self.lr / 3, self.retries - 1, 0)
        if finite and not result.stopped and self.raises:
            # A rate that was raised must not be lowered again: the two rules could alternate forever.
            return _Attempt(self.lr * 3, 0, self.raises - 1)
        return None


class _Ascent:
    """One attempt for all models, with the active and the failed models as flags on the device (bool ``[G]``)."""

    def __init__(
        self, trained: Trained, settings: UnlearnSettings, stop_accuracies: Sequence[float], budget: Budget
    ) -> None:
        self._trained, self._settings, self._budget = trained, settings, budget
        self._start, self._done = time.perf_counter(), 0
        device = next(trained.module.parameters()).device
        self._stop_accuracies = torch.tensor(stop_accuracies, dtype=torch.float64, device=device)
        self._accuracies = torch.zeros_like(self._stop_accuracies)  # their sum since the start of the epoch
        self._going = torch.ones(len(stop_accuracies), dtype=torch.bool, device=device)
        self._failed = torch.zeros_like(self._going)
        self._first = torch.full_like(self._stop_accuracies, torch.nan)
        self._is_half_way = torch.zeros_like(self._going)

    def run(
        self, models: Sequence[Model], data: CleanData, rates: Sequence[float], seed: int, precision: Precision
    ) -> list[tuple[Unlearned, bool]]:
        """The result of every model, and whether it stayed finite."""
        settings, trained, device = self._settings, self._trained, models[0].device
        # The stack uses the plan of one model, so that it runs as that model would by itself.
        one = trained.module if trained.reads_back else models[0].clone().module.train()
        plan = plan_for(precision, one, data.images)
        trained.start(plan, rates, settings.momentum, settings.weight_decay)
        trained.start_saving()
        generator = torch.Generator().manual_seed(seed)
        # Mirrored images do no harm here, where the task is to be lost; scans were calibrated with them.
        data = replace(data, mirror=True)
        shuffled = passes(data, settings.max_epochs, settings.batch_size, settings.padding, generator, device)
        steps: list[tuple[Tensor, ...]] = []
        trained.lower_rates(settings.milestones.count(0))
        for epoch, done in enumerate(epochs(self._step, shuffled, self._going, trained.reads_back), 1):
            steps += done
            if device.type == "cuda":  # there a step is captured once, and looks at no clock
                self._budget.check()
            if settings.stop_on == "epoch":
                self._going &= self._accuracies / len(done) > self._stop_accuracies
            self._accuracies.zero_()
            trained.lower_rates(settings.milestones.count(epoch))
        trajectories = _read(steps, models)
        failed, stopped = self._failed.tolist(), (~self._going & ~self._failed).tolist()
        per_epoch = -(-len(data) // settings.batch_size)
        return [
            (
                Unlearned(trained.model(g), trajectories[g], per_epoch, rates[g], stopped[g], plan, trained.saved(g)),
                not failed[g],
            )
            for g in range(len(models))
        ]

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Losses, which models moved (``[G]``) and predictions ``[G, N]`` of one step of ascent.

        A model that has stopped, or whose next state would not be finite, does not change.
        """
        self._keep_to_budget()
        logits = self._trained.logits(images)
        losses = mean_losses(logits, labels)
        moved = self._trained.move(-losses, self._going)
        going = self._going.clone()
        with torch.no_grad():
            predicted = logits.argmax(2)
            # A quotient of integers is the same on every device; a mean may differ in the last bit.
            accuracies = ((predicted == labels).sum(1) / len(labels)).double()
            self._accuracies += accuracies
            self._failed |= self._going & ~moved
            self._going.copy_(moved)
            if self._settings.stop_on == "batch":
                self._going &= accuracies > self._stop_accuracies
            self._first.copy_(torch.where(self._first.isnan(), accuracies, self._first))
            fallen = going & ~self._is_half_way & (accuracies <= _HALF_WAY * self._first)
            self._trained.save(fallen)
            self._is_half_way |= fallen
        return losses.detach(), moved, predicted

    def _keep_to_budget(self) -> None:
        """Gives up before a step if even the fewest steps that count do not fit at the pace of the steps so far."""
        more = max(self._settings.min_steps - self._done, 1)
        pace = (time.perf_counter() - self._start) / self._done if self._done else 0.0
        self._budget.check(more * pace)
        self._done += 1


def _read(steps: Sequence[tuple[Tensor, ...]], models: Sequence[Model]) -> list[tuple[UnlearnStep, ...]]:
    """The trajectory of each model, with the steps that moved it; takes only a few copies from the device."""
    if not steps:
        return [()] * len(models)
    losses, moved, predicted, labels = zip(*steps, strict=True)
    sizes = [len(one) for one in labels]
    columns = (
        torch.stack(losses).tolist(),
        torch.cat(predicted, 1).cpu().split(sizes, 1),
        torch.cat(labels).cpu().split(sizes),
    )
    records = [_records(*step, models[0].num_classes) for step in zip(*columns, strict=True)]
    counts = torch.stack(moved).tolist()
    return [
        tuple(of_all[g] for of_all, counted in zip(records, counts, strict=True) if counted[g])
        for g in range(len(models))
    ]


def _records(losses: Sequence[float], predicted: Tensor, labels: Tensor, num_classes: int) -> list[UnlearnStep]:
    """The record of one step of every model, from its loss and its predictions ``[G, N]``."""
    right = predicted == labels
    votes = functional.one_hot(predicted, num_classes)
    columns = (
        losses,
        right.float().mean(1).tolist(),
        votes.sum(1).tolist(),
        votes.mul(~right.unsqueeze(2)).sum(1).tolist(),
    )
    label_counts = tuple(torch.bincount(labels, minlength=num_classes).tolist())
    return [
        UnlearnStep(loss, accuracy, tuple(all_votes), tuple(wrong_votes), label_counts)
        for loss, accuracy, all_votes, wrong_votes in zip(*columns, strict=True)
    ]
