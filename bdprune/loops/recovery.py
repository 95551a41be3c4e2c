"""Recovery: learns a mask over the filters of an unlearned network that restores clean accuracy (RNP, Equation 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bdprune.data import CleanData
from bdprune.errors import ArchitectureError, TrainingError
from bdprune.model import MaskedNetwork, Model, StackedNetwork
from bdprune.record import check_settings
from bdprune.runtime import (
    DEFAULT,
    Plan,
    Precision,
    epochs,
    keep_running_statistics,
    mean_losses,
    only,
    passes,
    plan_for,
    seeded,
)

NO_FILTERS = "The network has no conv, so there is no filter to mask."
RETRAIN = "Use a method that retrains, such as ibau."


@dataclass(frozen=True)
class RecoverSettings:
    """How to recover.

    Args:
        lr: learning rate of the masks.
        momentum: SGD momentum. Adam does not work: it would equalise the tiny gradients and move every mask.
        loss_scale: factor on the cross-entropy (0.2 in the authors' code; not given in the paper).
        batch_size: images in one step.
        epochs: passes over the data.
        padding: pixels of the random crop; half of the images are also mirrored.
        small_data: below this number of images, batch norms use their running statistics and do not update them.

    Raises:
        OptionError: a setting is out of range.
    """

    lr: float = 0.2
    momentum: float = 0.9
    loss_scale: float = 1.0
    batch_size: int = 128
    epochs: int = 20
    padding: int = 4
    small_data: int = 64

    def __post_init__(self) -> None:
        check_settings(self, {"momentum": 0, "batch_size": 1, "epochs": 1, "padding": 0}, {"lr": 0, "loss_scale": 0})


@dataclass(frozen=True)
class Recovered:
    """Masks in [0, 1] of each filter group (``[num_filters]``, CPU), the losses of all steps, and their plan."""

    masks: dict[str, Tensor]
    losses: tuple[float, ...]
    plan: Plan = field(default_factory=Plan)


def recover(
    unlearned: Model, data: CleanData, settings: RecoverSettings, seed: int = 0, precision: Precision = DEFAULT
) -> Recovered:
    """Minimises cross-entropy on ``data`` over the masks only; the weights of ``unlearned`` do not change.

    Masks start at one and are clipped to [0, 1] after every step.

    Args:
        precision: see :func:`bdprune.runtime.plan_for`.

    Raises:
        OptionError: an unknown precision.
        TrainingError: a loss is not finite.
    """
    return only(recover_stack([unlearned], data, settings, seed, precision))


def recover_stack(
    unlearned: Sequence[Model],
    data: CleanData,
    settings: RecoverSettings,
    seed: int = 0,
    precision: Precision = DEFAULT,
) -> list[Recovered | TrainingError]:
    """The result of :func:`recover` for each model, or its error; several models share their steps.

    Raises:
        ArchitectureError: the network has no conv.
        OptionError: an unknown precision.
        ValueError: the models cannot be stacked.
    """
    if not unlearned[0].groups:
        raise ArchitectureError(NO_FILTERS, RETRAIN)
    masked, plan = _masked(unlearned, data, settings, precision)
    optimizer = torch.optim.SGD(masked.masks.values(), settings.lr, settings.momentum)
    device = unlearned[0].device
    going = torch.ones(len(unlearned), dtype=torch.bool, device=device)

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits = plan.logits(masked, images)
        losses = settings.loss_scale * mean_losses(logits if logits.dim() == 3 else logits.unsqueeze(0), labels)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        masked.clamp_()
        going.logical_and_(losses.detach().isfinite())
        return (losses.detach(),)

    generator = torch.Generator().manual_seed(seed)
    shuffled = passes(data, settings.epochs, settings.batch_size, settings.padding, generator, device)
    with seeded(seed):
        losses = torch.stack([losses for done in epochs(step, shuffled, going) for losses, _ in done], 1).cpu()
    masks = {name: mask.detach().cpu().view(len(unlearned), -1) for name, mask in masked.masks.items()}
    return [
        _recovered({name: own[g].clone() for name, own in masks.items()}, losses[g], settings.loss_scale, plan)
        for g in range(len(unlearned))
    ]


def _masked(
    unlearned: Sequence[Model], data: CleanData, settings: RecoverSettings, precision: Precision
) -> tuple[MaskedNetwork, Plan]:
    """One network with masks for all models, in the layout of the plan for one of them."""
    alone = MaskedNetwork(unlearned[0]).train()
    several = [MaskedNetwork(StackedNetwork(unlearned, frozen=True)).train()] if len(unlearned) > 1 else []
    for masked in (alone, *several):
        if len(data) < settings.small_data:
            keep_running_statistics(masked)
    plan = plan_for(precision, alone, data.images)
    masked = several[0] if several else alone
    plan.arrange(masked.network)
    return masked, plan


def _recovered(masks: dict[str, Tensor], losses: Tensor, scale: float, plan: Plan) -> Recovered | TrainingError:
    broken = (~losses.isfinite()).nonzero()
    if len(broken):
        return TrainingError(
            f"The loss of recovery is not finite in step {int(broken[0]) + 1}.",
            "Unlearn less: a higher stop accuracy or a smaller learning rate.",
        )
    return Recovered(masks, tuple(loss / scale for loss in losses.tolist()), plan)
