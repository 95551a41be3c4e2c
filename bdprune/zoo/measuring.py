"""What a zoo knows of a model: clean accuracy, attack success, robust accuracy, on a whole test set."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdprune.attacks import Attack
from bdprune.data import RawImages
from bdprune.runtime import DEFAULT, convs_of, predict

_BATCH_ON_CPU, _BATCH = 125, 500  # on a CPU the maps of fewer images stay in its caches


@dataclass(frozen=True)
class Measured:
    """Accuracies in [0, 1]; those of attacks are None for a clean model.

    Attributes:
        clean_accuracy: share of all test images, those of the target label included, predicted as their label.
        attack_success_rate: share of triggered images predicted as the attacker wants; images that have that label
            anyway are left out.
        robust_accuracy: share of the same images predicted as their true label.
        class_success: attack success rate by true label, None for labels that are left out; empty for a clean model.
    """

    clean_accuracy: float
    attack_success_rate: float | None = None
    robust_accuracy: float | None = None
    class_success: tuple[float | None, ...] = ()


def measure(
    network: nn.Module,
    test: RawImages,
    num_classes: int,
    attack: Attack | None = None,
    trigger: nn.Module | None = None,
) -> Measured:
    """Measures a model with its own trigger at full strength, in float32 with Winograd's convolutions where they pay.

    Args:
        network: images in [0, 1] -> logits, in eval mode.
        test: all test images.
        num_classes: K.
        attack: the model's attack, None for a clean model.
        trigger: images in [0, 1] -> triggered images, on the CPU; the same for every image batch. A copy of it runs
            where the network is: a generator is work for a GPU, too.
    """
    labels = test.labels
    accuracy = _share(_predict(network, test.images, None) == labels)
    if attack is None or trigger is None:
        return Measured(accuracy)
    goal = attack.goal(labels, num_classes)
    counts = goal != labels
    labels, goal = labels[counts], goal[counts]
    trigger = copy.deepcopy(trigger).to(next(network.parameters()).device)
    predicted = _predict(network, test.images[counts], trigger)
    hit = predicted == goal
    by_class = tuple(_share(hit[labels == label]) if (labels == label).any() else None for label in range(num_classes))
    return Measured(accuracy, _share(hit), _share(predicted == labels), by_class)


@torch.no_grad()
def _predict(network: nn.Module, images: Tensor, trigger: nn.Module | None) -> Tensor:
    """Labels ``[N]`` of images uint8 ``[N, C, H, W]``, triggered where there is a trigger."""
    parts = []
    device = next(network.parameters()).device
    for batch in images.split(_BATCH_ON_CPU if device.type == "cpu" else _BATCH):
        floats = batch.to(device).float() / 255
        shown = trigger(floats).clamp(0, 1) if trigger else floats
        with convs_of(DEFAULT):
            parts.append(predict(network, shown))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()
