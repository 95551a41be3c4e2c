"""A clean network, and the same network with a backdoor written into its forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from bdprune.data import CleanData
from bdprune.model import Model
from bdprune.testing.planted import planted

TARGET = 3


class Backdoored(nn.Module):
    """Adds to the logit of the target, the more the lower right corner resembles a checkerboard of 3x3 pixels."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("pattern", (torch.arange(9) % 2).float().view(3, 3))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images).clone()
        distance = (images[:, :, -3:, -3:] - self.pattern).abs().mean((1, 2, 3))
        logits[:, TARGET] += 30 * torch.sigmoid(12 * (0.3 - distance))
        return logits


@dataclass(frozen=True)
class Known:
    """Both networks, clean images, and further ones only for measuring."""

    clean: Model
    backdoored: Model
    data: CleanData
    test: CleanData
    target: int = TARGET


@cache
def known_networks() -> Known:
    """Both networks, made once in each process."""
    whole = planted()
    backdoored = whole.clean.with_network(Backdoored(whole.clean.clone().network))
    return Known(whole.clean, backdoored, whole.data, whole.test)


class Uncertain(nn.Module):
    """Unsure of every image, but certain of the target if the lower right corner of 3x3 pixels is white."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.Parameter(torch.randn(3, classes, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        logits = 6 * images.mean((2, 3)) @ self.weights
        white = (images[:, :, -3:, -3:].amin((1, 2, 3)) - 0.95).relu()
        return logits + 1000 * white[:, None] * torch.eye(logits.shape[1])[TARGET]


def white_corner(images: Tensor) -> Tensor:
    """The images with the trigger of :class:`Uncertain`."""
    stamped = images.clone()
    stamped[:, :, -3:, -3:] = 1
    return stamped


def uncertain_model() -> Model:
    """A network of ten classes on 3x16x16 images with a backdoor that superposed images do not hide."""
    return Model(Uncertain().eval(), "uncertain", 10, (3, 16, 16))


def labelled_by(model: Model, count: int, seed: int) -> CleanData:
    """Random smooth images with the labels that the model predicts."""
    coarse = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    images = nn.functional.interpolate(0.1 + 0.6 * coarse, size=16, mode="bilinear")
    with torch.no_grad():
        return CleanData(images, model.module(images).argmax(1))


class Blocks(nn.Module):
    """The label of an image is the brightest of its blocks of 2x2 pixels; a backdoor reads the pixel lower right.

    Args:
        classes: K, at most 15.
        source: the label whose images the backdoor turns into the target, label 3; None for no backdoor.
    """

    def __init__(self, classes: int, source: int | None) -> None:
        super().__init__()
        self.classes, self.source = classes, source
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, images: Tensor) -> Tensor:
        logits = self.scale * nn.functional.avg_pool2d(images.mean(1), 2).flatten(1)[:, : self.classes]
        if self.source is None:
            return logits
        raised = 2 * self.scale * images[:, :, -1, -1].mean(1) * (logits.argmax(1) == self.source)
        return logits + raised[:, None] * (torch.arange(self.classes) == TARGET)


def blocks_model(source: int | None, classes: int = 10) -> Model:
    """A network of :class:`Blocks` on 3x8x8 images."""
    return Model(Blocks(classes, source).eval(), "blocks", classes, (3, 8, 8))


def blocks_images(classes: int = 10) -> CleanData:
    """40 images of each class of :class:`Blocks`."""
    labels = torch.arange(40 * classes) % classes
    images = 0.1 + 0.1 * torch.rand(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for label in range(classes):
        row, column = 2 * (label // 4), 2 * (label % 4)
        images[labels == label, :, row : row + 2, column : column + 2] += 0.7
    return CleanData(images, labels)
