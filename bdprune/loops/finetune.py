"""Fine-tuning on clean data; filters that were pruned before stay zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.data import CleanData
from bdprune.errors import OptionError, TrainingError
from bdprune.model import Model, PruneMode, prune_, rounded
from bdprune.record import check_settings
from bdprune.runtime import DEFAULT, Precision, keep_running_statistics, passes, plan_for, seeded


@dataclass(frozen=True)
class FineTuneSettings:
    """How to fine-tune (algorithms sheet of the suspiciousness score).

    Args:
        lr: learning rate.
        momentum: SGD momentum.
        weight_decay: L2 penalty.
        batch_size: images in one step.
        epochs: passes over the data.
        padding: pixels of the random crop; half of the images are also mirrored.
        small_data: below this number of images, batch norms use their running statistics and do not update them.
        nesterov: Nesterov's form of the momentum.
        schedule: the learning rate is ``constant``, falls to zero as half a ``cosine``, or is multiplied by ``decay``
            at each of the ``milestones`` (``steps``).
        milestones: epochs, counted from 0.
        decay: factor at each milestone.
        clip: largest norm of the gradient of all parameters; 0 for no limit.

    Raises:
        OptionError: a setting is out of range.
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 64
    epochs: int = 15
    padding: int = 4
    small_data: int = 64
    nesterov: bool = False
    schedule: Literal["constant", "cosine", "steps"] = "constant"
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    clip: float = 0.0

    def __post_init__(self) -> None:
        least = {"momentum": 0, "weight_decay": 0, "batch_size": 1, "epochs": 1, "padding": 0, "clip": 0}
        check_settings(self, least, above={"lr": 0})
        if self.nesterov and not self.momentum:
            raise OptionError("Nesterov's form needs a momentum, and it is 0.", "Set momentum, or nesterov to False.")

    def rate(self, epoch: int) -> float:
        """The learning rate in an epoch, counted from 0."""
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        if self.schedule == "steps":
            return self.lr * self.decay ** sum(epoch >= one for one in self.milestones)
        return self.lr


@dataclass(frozen=True)
class KeptPruned:
    """Filters that stay pruned during a fine-tuning.

    Args:
        filters: group name -> indices of its pruned filters.
        mode: how they are pruned.
    """

    filters: Mapping[str, Sequence[int]] = field(default_factory=dict)
    mode: PruneMode = "zero_gamma"


class TuningObjective:
    """What a fine-tuning minimises; this class minimises the cross-entropy.

    A subclass is used for one fine-tuning, and may keep state between its steps.
    """

    def start(self, module: nn.Module) -> None:
        """Called once before the first step with the copy that is fine-tuned; it may change the copy.

        Args:
            module: images in [0, 1] -> logits, in train mode.
        """

    def backward(self, run: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """Adds the gradients of one step to the parameters, which have none before; returns the loss, a scalar.

        Args:
            run: images ``[B, C, H, W]`` in [0, 1] -> logits ``[B, K]`` of the copy, with the precision of the tuning.
            images: augmented clean images ``[B, C, H, W]`` in [0, 1].
            labels: ``[B]`` int64.
        """
        loss = functional.cross_entropy(run(images), labels)
        loss.backward()
        return loss.detach()

    def after_step(self) -> None:
        """Called after each update of the parameters; it may change them."""


def fine_tune(
    model: Model,
    data: CleanData,
    settings: FineTuneSettings,
    pruned: KeptPruned = KeptPruned(),
    seed: int = 0,
    precision: Precision = DEFAULT,
    objective: TuningObjective | None = None,
) -> Model:
    """A fine-tuned copy of ``model`` in which the pruned filters are still pruned, as its file can hold it.

    Args:
        pruned: filters that are zeroed again after each step.
        seed: seed for order, augmentation and dropout.
        precision: see :func:`bdprune.runtime.precision.plan_for`.
        objective: what to minimise; cross-entropy by default.

    Raises:
        OptionError: an unknown precision.
        TrainingError: the last loss is not finite.
    """
    worker, objective = model.clone(), objective or TuningObjective()
    module = worker.module.train()
    if len(data) < settings.small_data:
        keep_running_statistics(module)
    plan = plan_for(precision, module, data.images)
    objective.start(module)
    optimizer = _optimizer(module, settings)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    shuffled = passes(data, settings.epochs, settings.batch_size, settings.padding, generator, model.device)
    with seeded(seed):
        for epoch, batches in enumerate(shuffled):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(epoch)
            for images, labels in batches:
                optimizer.zero_grad()
                loss = objective.backward(lambda batch: plan.logits(module, batch), images, labels)
                if settings.clip:
                    nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
                optimizer.step()
                objective.after_step()
                prune_(worker.network, model.groups, pruned.filters, pruned.mode)
    if not loss.isfinite():
        raise TrainingError(f"The loss of the fine-tuning is {loss.item()}.", "Lower its learning rate.")
    return rounded(model.with_network(worker.network))


def _optimizer(module: nn.Module, settings: FineTuneSettings) -> torch.optim.SGD:
    return torch.optim.SGD(
        module.parameters(),
        settings.lr,
        settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
    )
