"""Unlearning: gradient ascent on clean data until the network has forgotten its task (RNP, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.data import CleanData
from bdprune.errors import TrainingError
from bdprune.loops.trajectory import UnlearnStep
from bdprune.model import Model, why_not
from bdprune.runtime import DEFAULT, Plan, Precision, clean_accuracy, keep_running_statistics, passes, plan_for


@dataclass(frozen=True)
class UnlearnSettings:
    """How to unlearn.

    Args:
        lr: learning rate of the first try.
        momentum: SGD momentum.
        weight_decay: L2 penalty; it keeps pulling the weights down while the loss is driven up.
        batch_size: images a step.
        max_epochs: passes over the data at most.
        stop_accuracy: stop once train-mode accuracy is at or below this, in [0, 1]; None means chance, 1 / K.
        stop_share: stop at this share of the accuracy before unlearning, in (0, 1); None goes by stop_accuracy.
        stop_on: what that accuracy is measured over: the last ``batch`` or the whole ``epoch``.
        milestones: epochs after which the learning rate is divided by ten.
        padding: pixels of the random crop; a mirrored half goes with it.
        small_data: below this many images, batch norms use their running statistics and leave them alone.
        retries: how often to start over with a tenth of the learning rate after a loss that is not finite.
        min_steps: start over with a third of the learning rate when the stop accuracy comes sooner than this: a
            network that falls in a few steps shows nothing on the way. 0 takes whatever comes.
        raises: how often to start over with three times the learning rate when it does not come within max_epochs.
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-2
    batch_size: int = 128
    max_epochs: int = 20
    stop_accuracy: float | None = None
    stop_share: float | None = None
    stop_on: str = "batch"
    milestones: tuple[int, ...] = ()
    padding: int = 4
    small_data: int = 64
    retries: int = 5
    min_steps: int = 0
    raises: int = 0


@dataclass(frozen=True)
class Unlearned:
    """An unlearned model and the way there.

    Attributes:
        model: the unlearned model, at its last finite state.
        trajectory: one entry a step.
        steps_per_epoch: steps in one pass over the data.
        lr: learning rate of the try that ended finite.
        stopped: whether the stop accuracy was reached.
        plan: number format and memory layout of the steps.
    """

    model: Model
    trajectory: tuple[UnlearnStep, ...]
    steps_per_epoch: int
    lr: float
    stopped: bool
    plan: Plan = field(default_factory=Plan)


def unlearn(
    model: Model, data: CleanData, settings: UnlearnSettings, seed: int = 0, precision: Precision = DEFAULT
) -> Unlearned:
    """Maximises cross-entropy on ``data`` over all parameters of a copy of ``model``.

    The learning rate of ``settings`` is where it starts; the settings say when to start over with another. The last
    try counts, with its last finite state.

    Args:
        precision: see :func:`bdprune.runtime.precision.plan_for`.

    Raises:
        OptionError: an unknown precision.
        TrainingError: not one step of the last try was finite.
    """
    if _runs_as_stack(model):
        from bdprune.loops.together import unlearn_together

        (alone,) = unlearn_together([model], data, settings, seed, precision)
        if isinstance(alone, TrainingError):
            raise alone
        return alone
    attempt: Attempt | None = Attempt(settings.lr, settings.retries, settings.raises)
    while attempt:
        result, finite = _ascend(model, data, settings, attempt.lr, seed, precision)
        attempt = attempt.after(result, finite, settings.min_steps)
    if not result.trajectory:
        raise no_finite_step(result.lr)
    return result


def _runs_as_stack(model: Model) -> bool:
    """Whether ``model`` runs as a stack of one, whose steps read nothing back: on a GPU that waits for the device."""
    return model.device.type == "cuda" and not why_not([model])


def no_finite_step(lr: float) -> TrainingError:
    """The error of an unlearning whose last try broke down at once."""
    return TrainingError(
        f"Unlearning gave a loss that is not finite at learning rate {lr:g}.",
        "Check that the checkpoint's weights and the images are sound, or set a smaller learning rate.",
    )


@dataclass(frozen=True)
class Attempt:
    """One try: its learning rate, and how often that may still be lowered and raised."""

    lr: float
    retries: int
    raises: int

    def after(self, result: Unlearned, finite: bool, min_steps: int) -> Attempt | None:
        """The next try, None where the last one counts."""
        if not finite and self.retries:
            return Attempt(self.lr / 10, self.retries - 1, 0)
        if finite and result.stopped and len(result.trajectory) < min_steps and self.retries:
            return Attempt(self.lr / 3, self.retries - 1, 0)
        if finite and not result.stopped and self.raises:
            # Having raised the rate once, it must not be lowered again: the two rules could alternate for ever.
            return Attempt(self.lr * 3, 0, self.raises - 1)
        return None


def _ascend(
    model: Model, data: CleanData, settings: UnlearnSettings, lr: float, seed: int, precision: Precision
) -> tuple[Unlearned, bool]:
    """One try at one learning rate, and whether it stayed finite."""
    worker = model.clone()
    module = worker.module.train()
    if len(data) < settings.small_data:
        keep_running_statistics(module)
    plan = plan_for(precision, module, data.images)
    plan.arrange(module)
    optimizer = torch.optim.SGD(module.parameters(), lr, settings.momentum, weight_decay=settings.weight_decay)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(settings.milestones), 0.1)
    floor = stop_accuracy(model, data, settings)
    generator = torch.Generator().manual_seed(seed)
    trajectory: list[UnlearnStep] = []
    last_finite = _Snapshot(worker.network)
    stopped = False
    batches_per_epoch = -(-len(data) // settings.batch_size)
    for batches in passes(data, settings.max_epochs, settings.batch_size, settings.padding, generator, model.device):
        for images, labels in batches:
            step = _ascent_step(module, plan, optimizer, images, labels, model.num_classes)
            if step is None or not last_finite.take():
                last_finite.restore()
                unlearned = model.with_network(worker.network)
                return Unlearned(unlearned, tuple(trajectory), batches_per_epoch, lr, False, plan), False
            trajectory.append(step)
            if settings.stop_on == "batch" and step.accuracy <= floor:
                stopped = True
                break
        epoch = trajectory[-batches_per_epoch:]
        if settings.stop_on == "epoch" and sum(step.accuracy for step in epoch) / len(epoch) <= floor:
            stopped = True
        if stopped:
            break
        scheduler.step()
    unlearned = model.with_network(worker.network)
    return Unlearned(unlearned, tuple(trajectory), batches_per_epoch, lr, stopped, plan), True


def stop_accuracy(model: Model, data: CleanData, settings: UnlearnSettings) -> float:
    """The accuracy, in [0, 1], at which unlearning ``model`` stops."""
    if settings.stop_share is not None:
        return settings.stop_share * clean_accuracy(model.module, data.images, data.labels)
    return settings.stop_accuracy if settings.stop_accuracy is not None else 1 / model.num_classes


def _ascent_step(
    module: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, num_classes: int
) -> UnlearnStep | None:
    logits = plan.logits(module, images)
    loss = functional.cross_entropy(logits, labels)
    value = loss.item()
    if not math.isfinite(value):
        return None
    optimizer.zero_grad()
    (-loss).backward()
    optimizer.step()
    # Counted on the CPU: there every count is free, on a GPU each would wait for the device.
    predicted, labels = logits.detach().argmax(1).cpu(), labels.cpu()
    return steps_of([value], predicted[None], labels, num_classes)[0]


def steps_of(losses: Sequence[float], predicted: Tensor, labels: Tensor, num_classes: int) -> list[UnlearnStep]:
    """The records of one step of every model.

    Args:
        losses: of each model.
        predicted: labels ``[G, N]``, on the CPU.
        labels: ``[N]``, on the CPU.
    """
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


class _Snapshot:
    """The last finite state of ``network``, in memory that is taken once."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._kept: dict[str, Tensor] = {name: value.clone() for name, value in network.state_dict().items()}

    @torch.no_grad()
    def take(self) -> bool:
        """Keeps the state as it is now if all of it is finite, and says whether it is."""
        state: dict[str, Tensor] = self._network.state_dict()
        floating = [value for value in state.values() if value.is_floating_point() and value.numel()]
        # The extremes pass on what is not a number; one look at all of them waits for the device once.
        if not bool(torch.cat([torch.stack(value.aminmax()) for value in floating]).isfinite().all()):
            return False
        for name, value in state.items():
            self._kept[name].copy_(value)
        return True

    def restore(self) -> None:
        """Puts the network back into the state that was kept."""
        self._network.load_state_dict(self._kept)
