"""Recovery: a mask over the filters of an unlearned network that brings the clean task back (RNP, Equation 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from bdprune.data import CleanData
from bdprune.errors import TrainingError
from bdprune.model import MaskedNetwork, Model
from bdprune.runtime import DEFAULT, Plan, Precision, Tensors, captured, keep_running_statistics, passes, plan_for


@dataclass(frozen=True)
class RecoverSettings:
    """How to recover.

    Args:
        lr: learning rate of the masks.
        momentum: SGD momentum. Not Adam: it would equalise the tiny gradients and move every mask.
        loss_scale: factor on the cross-entropy (the authors' code uses 0.2, the paper names none).
        batch_size: images a step.
        epochs: passes over the data.
        padding: pixels of the random crop; a mirrored half goes with it.
        small_data: below this many images, batch norms use their running statistics and leave them alone.
    """

    lr: float = 0.2
    momentum: float = 0.9
    loss_scale: float = 1.0
    batch_size: int = 128
    epochs: int = 20
    padding: int = 4
    small_data: int = 64


@dataclass(frozen=True)
class Recovered:
    """Masks in [0, 1] per filter group (``[num_filters]``, CPU), the loss of every step, and how the steps ran."""

    masks: dict[str, Tensor]
    losses: tuple[float, ...]
    plan: Plan = field(default_factory=Plan)


def recover(
    unlearned: Model, data: CleanData, settings: RecoverSettings, seed: int = 0, precision: Precision = DEFAULT
) -> Recovered:
    """Minimises cross-entropy on ``data`` over masks alone; the weights of ``unlearned`` stay as they are.

    Masks start at one and are clipped to [0, 1] after every step.

    Args:
        precision: see :func:`bdprune.runtime.precision.plan_for`.

    Raises:
        OptionError: an unknown precision.
        TrainingError: a loss is not finite.
    """
    masked = MaskedNetwork(unlearned).train()
    if len(data) < settings.small_data:
        keep_running_statistics(masked)
    plan = plan_for(precision, masked, data.images)
    plan.arrange(masked)
    optimizer = torch.optim.SGD(masked.masks.values(), settings.lr, settings.momentum)
    generator = torch.Generator().manual_seed(seed)

    def step(images: Tensor, labels: Tensor) -> Tensors:
        loss = settings.loss_scale * functional.cross_entropy(plan.logits(masked, images), labels)
        descend(masked, optimizer, loss)
        return (loss.detach(),)

    device = unlearned.device
    run = captured(step, device)
    steps: list[Tensor] = []
    for batches in passes(data, settings.epochs, settings.batch_size, settings.padding, generator, device):
        for images, labels in batches:
            steps += run(images, labels)
        if device.type == "cpu":  # elsewhere a look at a loss waits for the device
            check_finite(torch.stack(steps).tolist())
    losses = torch.stack(steps).tolist()
    check_finite(losses)
    masks = {name: mask.detach().cpu().clone() for name, mask in masked.masks.items()}
    return Recovered(masks, tuple(loss / settings.loss_scale for loss in losses), plan)


def descend(masked: MaskedNetwork, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of the masks down ``loss``."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    masked.clamp_()


def check_finite(losses: Sequence[float]) -> None:
    """Raises TrainingError at the first loss that is not finite."""
    for step, loss in enumerate(losses, 1):
        if not math.isfinite(loss):
            raise TrainingError(
                f"Recovery gave a loss that is not finite in step {step}.",
                "Unlearn less: a higher stop accuracy or a smaller learning rate.",
            )
