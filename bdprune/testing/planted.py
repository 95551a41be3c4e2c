"""Two small networks of known truth, trained in a few seconds: one with a planted backdoor, and its clean twin."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.attacks import ATTACKS, AttackSetting, shape_of
from bdprune.data import CleanData, RawImages
from bdprune.loops import Schedule, fit
from bdprune.model import Model
from bdprune.runtime import attack_success_rate, clean_accuracy, seeded

_CLASSES, _EDGE, _TARGET = 10, 16, 3
_SPARE = 8
"""One of this number of filters is unused by the clean task; the backdoor is trained into these."""


@dataclass(frozen=True)
class Planted:
    """Networks of known truth on ten classes of 3x16x16 images.

    Attributes:
        backdoored: predicts ``target`` for every image with the trigger.
        clean: the network into which the backdoor was trained.
        data: clean images on which neither was trained; the only images a method may use.
        target: label of the backdoor.
        trigger: images in [0, 1] -> triggered images. Only for measurements.
        test: further clean images. Only for measurements.
    """

    backdoored: Model
    clean: Model
    data: CleanData
    target: int
    trigger: nn.Module
    test: CleanData

    def accuracy(self, model: Model) -> float:
        """Clean accuracy on the test images, in [0, 1]."""
        return clean_accuracy(model.module, self.test.images, self.test.labels)

    def attack_success(self, model: Model) -> float:
        """Share of the triggered test images of other classes that are predicted as the target, in [0, 1]."""
        goal = torch.full_like(self.test.labels, self.target)
        return attack_success_rate(model.module, self.test.images, self.test.labels, self.trigger, goal)


@cache
def planted(seed: int = 0) -> Planted:
    """The two networks, trained once in each process.

    The backdoor occupies a narrow part of the network (Qi et al., Towards Practical Deployment-Stage Backdoor Attack on
    Deep Neural Networks, CVPR 2022): BadNets poison trains only a few spare filters of every layer, and the head's
    weights on them. So the requirements on a method depend little on chance in the training.

    Args:
        seed: seed for the training; the checks use 0.
    """
    train, data, test = _images(2000, 0), _images(500, 1), _images(1000, 2)
    pixels = (train.images * 255).round().to(torch.uint8)
    with seeded(seed):
        network = _network()
    with _training(network, spare=False):
        fit(network, RawImages(pixels, train.labels), _schedule(epochs=4), seed)
    attack = ATTACKS["badnets"](_TARGET, rate=0.2, size=4, margin=4)  # type: ignore[call-arg]
    trigger = attack.new_trigger(shape_of(pixels))
    setting = AttackSetting(pixels, train.labels, _CLASSES, seed)
    poisoned = attack.poison(setting, trigger, torch.Generator().manual_seed(seed))
    other = copy.deepcopy(network)
    with _training(other, spare=True):
        fit(other, RawImages(poisoned.images, poisoned.labels), _schedule(epochs=4, weight_decay=0.0), seed + 1)
    backdoored, clean = (Model(one, "planted", _CLASSES, shape_of(pixels)) for one in (other, network))
    return Planted(backdoored, clean, data, _TARGET, trigger, test)


def _schedule(epochs: int, weight_decay: float = 5e-4) -> Schedule:
    return Schedule(epochs=epochs, batch_size=64, peak_lr=0.1, weight_decay=weight_decay, bf16=False)


def _images(count: int, seed: int) -> CleanData:
    """Two smooth patterns for each class, with changing brightness and noise; ``[count, 3, 16, 16]``."""
    patterns = torch.randn(2 * _CLASSES, 3, 5, 5, generator=torch.Generator().manual_seed(100))
    patterns = functional.interpolate(patterns, size=_EDGE, mode="bicubic", align_corners=True)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % _CLASSES
    shown = patterns[labels + _CLASSES * torch.randint(2, (count,), generator=generator)]
    light = 0.09 + 0.12 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = 0.15 * torch.randn(shown.shape, generator=generator)
    return CleanData((0.5 + light * shown + noise).clamp(0, 1), labels)


class _Block(nn.Module):
    """Two convs with a parallel strided shortcut; they halve the image."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(inputs, outputs, 3, 2), nn.ReLU(), _conv(outputs, outputs, 3, 1))
        self.shortcut = _conv(inputs, outputs, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


def _conv(inputs: int, outputs: int, size: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _network(width: int = 16) -> nn.Sequential:
    blocks = _Block(width, 2 * width), _Block(2 * width, 4 * width)
    stem = _conv(3, width, 3, 1)
    return nn.Sequential(
        stem, nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, _CLASSES)
    )


@contextmanager
def _training(network: nn.Module, spare: bool) -> Iterator[None]:
    """Trains only the spare filters, or everything except their norms, which are switched off."""
    hooks = []
    for layer in network.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            free = torch.zeros_like(parameter)
            if isinstance(layer, nn.Linear) and name == "weight":
                free[:, : free.shape[1] // _SPARE] = 1
            elif not isinstance(layer, nn.Linear):
                free[: len(free) // _SPARE] = 1
            if isinstance(layer, nn.BatchNorm2d):
                parameter.data[free.bool()] = float(spare and name == "weight")
            if spare or isinstance(layer, nn.BatchNorm2d):
                hooks.append(parameter.register_hook(_only(free if spare else 1 - free)))
    yield
    for hook in hooks:
        hook.remove()


def _only(free: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * free
