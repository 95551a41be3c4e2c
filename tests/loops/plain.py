"""The loops for one model as written in the papers, with torch's optimisers; bdprune's loops equal them bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from bdprune.data.clean import CleanData
from bdprune.loops.recovery import RecoverSettings
from bdprune.loops.unlearning import UnlearnSettings
from bdprune.model.edit.mask import MaskedNetwork
from bdprune.model.handle import Model
from bdprune.runtime.batches import crop_and_flip

Epochs = Iterator[list[tuple[Tensor, Tensor]]]


def passes(data: CleanData, epochs: int, settings: UnlearnSettings | RecoverSettings, seed: int) -> Epochs:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(data), generator=generator)
        parts = order.tensor_split(-(-len(data) // settings.batch_size))
        yield [(crop_and_flip(data.images[part], generator, settings.padding), data.labels[part]) for part in parts]


def in_training(module: nn.Module, few: bool) -> nn.Module:
    module.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    for child in module.modules():
        if few and isinstance(child, _BatchNorm):
            child.eval()
    return module


def ascend(
    model: Model, data: CleanData, settings: UnlearnSettings, lr: float, floor: float, seed: int
) -> tuple[dict[str, Tensor], list[tuple[float, float]], bool]:
    """One attempt: its final weights, losses and accuracies of its steps, and whether it stopped."""
    worker = model.clone()
    module = in_training(worker.module, len(data) < settings.small_data)
    optimizer = torch.optim.SGD(module.parameters(), lr, settings.momentum, weight_decay=settings.weight_decay)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(settings.milestones), 0.1)
    seen: list[tuple[float, float]] = []
    for batches in passes(data, settings.max_epochs, settings, seed):
        for images, labels in batches:
            before = {name: value.clone() for name, value in worker.network.state_dict().items()}
            logits = module(images)
            loss = functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            (-loss).backward()
            optimizer.step()
            after = worker.network.state_dict()
            if not math.isfinite(loss.item()) or not all(value.isfinite().all() for value in after.values()):
                return before, seen, False
            seen.append((loss.item(), (logits.argmax(1) == labels).float().mean().item()))
            if settings.stop_on == "batch" and seen[-1][1] <= floor:
                return after, seen, True
        if settings.stop_on == "epoch" and mean([accuracy for _, accuracy in seen[-len(batches) :]]) <= floor:
            return after, seen, True
        scheduler.step()
    return worker.network.state_dict(), seen, False


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def recover(
    model: Model, data: CleanData, settings: RecoverSettings, seed: int
) -> tuple[dict[str, Tensor], list[float]]:
    """Masks and losses."""
    masked = MaskedNetwork(model)
    in_training(masked, len(data) < settings.small_data)
    optimizer = torch.optim.SGD(masked.masks.values(), settings.lr, settings.momentum)
    losses = []
    for batches in passes(data, settings.epochs, settings, seed):
        for images, labels in batches:
            loss = settings.loss_scale * functional.cross_entropy(masked(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            masked.clamp_()
            losses.append(loss.item() / settings.loss_scale)
    return {name: mask.detach() for name, mask in masked.masks.items()}, losses
