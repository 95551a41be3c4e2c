"""Unlearning and recovery of a stack of models in the same steps, each model as if it were alone.

Until a try is over nothing is read back from the device: whether a model has stopped or broken down is a number there
that decides over its next update, and trajectories are kept there. A GPU tells an epoch late that all have stopped
(:mod:`bdprune.runtime.watch`); the steps of that epoch change nothing and leave no record. So no step waits, and a
step can be recorded as a CUDA graph (:mod:`bdprune.runtime.graph`): learning rates come in as a tensor, and all that
it changes it changes in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bdprune.data import CleanData
from bdprune.errors import TrainingError
from bdprune.loops.recovery import Recovered, RecoverSettings, check_finite, descend
from bdprune.loops.trajectory import UnlearnStep
from bdprune.loops.unlearning import (
    Attempt,
    Unlearned,
    UnlearnSettings,
    no_finite_step,
    steps_of,
    stop_accuracy,
)
from bdprune.model import MaskedNetwork, Model, StackedNetwork
from bdprune.runtime import (
    DEFAULT,
    Batches,
    Plan,
    Precision,
    Tensors,
    captured,
    keep_running_statistics,
    passes,
    plan_for,
    watch_on,
)


def unlearn_together(
    models: Sequence[Model],
    data: CleanData,
    settings: UnlearnSettings,
    seed: int = 0,
    precision: Precision = DEFAULT,
) -> list[Unlearned | TrainingError]:
    """What :func:`bdprune.loops.unlearning.unlearn` makes of each model; its error where it would raise one.

    Models that need another try make it together, each at the learning rate of its own.
    """
    results: list[Unlearned | TrainingError] = [TrainingError("Not unlearned.", "")] * len(models)
    pending = {index: Attempt(settings.lr, settings.retries, settings.raises) for index in range(len(models))}
    floors = [stop_accuracy(model, data, settings) for model in models]
    while pending:
        tried = list(pending)
        tries = [(models[index], floors[index], pending[index].lr) for index in tried]
        outcomes = _ascend(tries, data, settings, seed, precision)
        for index, (result, finite) in zip(tried, outcomes, strict=True):
            attempt = pending.pop(index).after(result, finite, settings.min_steps)
            if attempt:
                pending[index] = attempt
            else:
                results[index] = result if result.trajectory else no_finite_step(result.lr)
    return results


def recover_together(
    unlearned: Sequence[Model],
    data: CleanData,
    settings: RecoverSettings,
    seed: int = 0,
    precision: Precision = DEFAULT,
) -> list[Recovered | TrainingError]:
    """What :func:`bdprune.loops.recovery.recover` makes of each model; its error where it would raise one."""
    stacked = StackedNetwork(unlearned, frozen=True)
    masked = MaskedNetwork(stacked).train()
    if len(data) < settings.small_data:
        keep_running_statistics(masked)
    plan = _plan(precision, unlearned[0], data)
    stacked.arrange(plan.channels_last)
    optimizer = torch.optim.SGD(masked.masks.values(), settings.lr, settings.momentum)
    generator = torch.Generator().manual_seed(seed)
    steps: list[Tensor] = []

    def step(images: Tensor, labels: Tensor) -> Tensors:
        losses = settings.loss_scale * _losses(plan.logits(masked, images), labels)
        descend(masked, optimizer, losses.sum())
        return (losses.detach(),)

    device = unlearned[0].device
    run = captured(step, device)
    for batches in passes(data, settings.epochs, settings.batch_size, settings.padding, generator, device):
        for images, labels in batches:
            steps += run(images, labels)
    masks = {name: mask.detach().cpu().clone() for name, mask in masked.masks.items()}
    by_model = torch.stack(steps, 1).tolist()
    return [_recovered(index, masks, losses, settings, plan) for index, losses in enumerate(by_model)]


def _recovered(
    index: int, masks: dict[str, Tensor], losses: list[float], settings: RecoverSettings, plan: Plan
) -> Recovered | TrainingError:
    try:
        check_finite(losses)
    except TrainingError as error:
        return error
    own = {name: mask[index].clone() for name, mask in masks.items()}
    return Recovered(own, tuple(loss / settings.loss_scale for loss in losses), plan)


@dataclass(frozen=True)
class _Seen:
    """One step of the stack, on the device: losses and whether the step counts ``[G]``, predictions ``[G, N]``."""

    losses: Tensor
    counts: Tensor
    predicted: Tensor
    labels: Tensor


class _Ascent:
    """The stack on its way: parameters, momenta and who is still going, all on the device."""

    def __init__(self, stacked: StackedNetwork, plan: Plan, settings: UnlearnSettings, floors: Sequence[float]) -> None:
        self._module, self._plan, self._settings = stacked, plan, settings
        self._parameters = [parameter for parameter in stacked.network.parameters() if parameter.requires_grad]
        self._buffers = list(stacked.network.buffers())
        self._momenta = [torch.zeros_like(parameter) for parameter in self._parameters]
        device = self._parameters[0].device
        self._floors = torch.tensor(floors, dtype=torch.float64, device=device)
        self._accuracies = torch.zeros_like(self._floors)  # their sum since the epoch began
        self.going = torch.ones(len(floors), dtype=torch.bool, device=device)
        self.failed = torch.zeros_like(self.going)
        self._run = captured(self._step, device)

    def epoch(self, batches: Batches, rates: Tensor) -> list[_Seen]:
        """Steps up the loss; a model that has stopped, or whose next state would not be finite, stays as it is."""
        self._accuracies.zero_()
        seen: list[_Seen] = []
        for images, labels in batches:
            losses, counts, predicted = self._run(images, labels, rates)
            seen.append(_Seen(losses, counts, predicted, labels))
        if self._settings.stop_on == "epoch":
            self.going &= self._accuracies / len(seen) > self._floors
        return seen

    def _step(self, images: Tensor, labels: Tensor, rates: Tensor) -> Tensors:
        before = [buffer.clone() for buffer in self._buffers]
        logits = self._plan.logits(self._module, images)
        losses = _losses(logits, labels)
        gradients = torch.autograd.grad(-losses.sum(), self._parameters)
        with torch.no_grad():
            after, momenta = self._moved(gradients, rates)
            finite = losses.isfinite() & _finite([*after, *self._buffers])
            counts = self.going & finite
            _keep([*self._parameters, *self._momenta], counts, [*after, *momenta])
            _keep(self._buffers, ~counts, before)
            predicted = logits.argmax(2)
            # A quotient of whole numbers, which is the same on every device: a mean may be off by a bit.
            accuracies = ((predicted == labels).sum(1) / len(labels)).double()
            self._accuracies += accuracies
            self.failed |= self.going & ~finite
            self.going.copy_(counts)
            if self._settings.stop_on == "batch":
                self.going &= accuracies > self._floors
        return losses.detach(), counts, predicted

    def _moved(self, gradients: Sequence[Tensor], rates: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters and momenta after a step of SGD with weight decay, each model at its own rate."""
        after, momenta = [], []
        for parameter, momentum, gradient in zip(self._parameters, self._momenta, gradients, strict=True):
            decayed = gradient.add(parameter, alpha=self._settings.weight_decay)
            momenta.append(momentum * self._settings.momentum + decayed)
            after.append(parameter - _per_model(rates, parameter) * momenta[-1])
        return after, momenta


def _ascend(
    tries: Sequence[tuple[Model, float, float]],
    data: CleanData,
    settings: UnlearnSettings,
    seed: int,
    precision: Precision,
) -> list[tuple[Unlearned, bool]]:
    """One try of every model, at its own stop accuracy and learning rate, and whether it stayed finite."""
    models, floors, rates = (list(of_all) for of_all in zip(*tries, strict=True))
    stacked = StackedNetwork(models).train()
    if len(data) < settings.small_data:
        keep_running_statistics(stacked)
    plan = _plan(precision, models[0], data)
    stacked.arrange(plan.channels_last)
    ascent = _Ascent(stacked, plan, settings, floors)
    device = models[0].device
    rate = torch.tensor(rates, dtype=torch.float32, device=device)
    watch = watch_on(device)
    generator = torch.Generator().manual_seed(seed)
    shuffled = passes(data, settings.max_epochs, settings.batch_size, settings.padding, generator, device)
    seen: list[_Seen] = []
    for epoch, batches in enumerate(shuffled):
        seen += ascent.epoch(batches, rate * 0.1 ** sum(milestone <= epoch for milestone in settings.milestones))
        if watch.is_over(ascent.going):
            break
    trajectories = _read(seen, len(models), models[0].num_classes)
    failed, stopped = ascent.failed.tolist(), (~ascent.going & ~ascent.failed).tolist()
    per_epoch = -(-len(data) // settings.batch_size)
    return [
        (Unlearned(stacked.model(g), tuple(trajectories[g]), per_epoch, rates[g], stopped[g], plan), not failed[g])
        for g in range(len(models))
    ]


def _read(seen: Sequence[_Seen], models: int, num_classes: int) -> list[list[UnlearnStep]]:
    """The steps of each model that count; a few copies from the device in all."""
    trajectories: list[list[UnlearnStep]] = [[] for _ in range(models)]
    if not seen:
        return trajectories
    losses, counts = (
        torch.stack(values).tolist() for values in zip(*((s.losses, s.counts) for s in seen), strict=True)
    )
    sizes = [len(step.labels) for step in seen]
    predicted = torch.cat([step.predicted for step in seen], 1).cpu().split(sizes, 1)
    labels = torch.cat([step.labels for step in seen]).cpu().split(sizes)
    for step, counting in zip(zip(losses, predicted, labels, strict=True), counts, strict=True):
        for trajectory, counted, record in zip(trajectories, counting, steps_of(*step, num_classes), strict=True):
            if counted:
                trajectory.append(record)
    return trajectories


def _plan(precision: Precision, model: Model, data: CleanData) -> Plan:
    """The plan of one model holds for the stack: it is what that model would run by alone."""
    module = model.clone().module.train()
    return plan_for(precision, module, data.images)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of every model ``[G]``, from logits ``[G, N, K]``."""
    stack, count, _ = logits.shape
    return (
        functional.cross_entropy(logits.flatten(0, 1), labels.repeat(stack), reduction="none")
        .view(stack, count)
        .mean(1)
    )


def _per_model(values: Tensor, like: Tensor) -> Tensor:
    """``[G]`` in a shape that broadcasts over ``[G, *]``."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _keep(values: Sequence[Tensor], chosen: Tensor, new: Sequence[Tensor]) -> None:
    """Puts ``new`` into ``values`` for the models that are ``chosen`` ``[G]``."""
    for value, other in zip(values, new, strict=True):
        value.copy_(torch.where(_per_model(chosen, value), other, value))


def _finite(tensors: Sequence[Tensor]) -> Tensor:
    """Which models ``[G]`` have only finite numbers in ``tensors``, each ``[G, *]``."""
    parts = [value.flatten(1).isfinite().all(1) for value in tensors if value.is_floating_point() and value.numel()]
    return torch.stack(parts).all(0)
