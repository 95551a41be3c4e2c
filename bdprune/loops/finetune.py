"""Fine-tuning after pruning; the pruned filters stay zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from bdprune.data import CleanData
from bdprune.model import Model, PruneMode, prune_
from bdprune.runtime import DEFAULT, Precision, keep_running_statistics, passes, plan_for


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
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 64
    epochs: int = 15
    padding: int = 4
    small_data: int = 64


def fine_tune(
    model: Model,
    data: CleanData,
    settings: FineTuneSettings,
    pruned: Mapping[str, Sequence[int]],
    mode: PruneMode,
    seed: int = 0,
    precision: Precision = DEFAULT,
) -> Model:
    """A fine-tuned copy of ``model`` in which the filters in ``pruned`` are still pruned by ``mode``.

    Args:
        pruned: group name -> indices of its pruned filters.
        seed: seed for order and augmentation.
        precision: see :func:`bdprune.runtime.precision.plan_for`.

    Raises:
        OptionError: an unknown precision.
    """
    worker = model.clone()
    module = worker.module.train()
    if len(data) < settings.small_data:
        keep_running_statistics(module)
    plan = plan_for(precision, module, data.images)
    optimizer = torch.optim.SGD(module.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    for batches in passes(data, settings.epochs, settings.batch_size, settings.padding, generator, model.device):
        for images, labels in batches:
            loss = functional.cross_entropy(plan.logits(module, images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            prune_(worker.network, model.groups, pruned, mode)
    return model.with_network(worker.network)
