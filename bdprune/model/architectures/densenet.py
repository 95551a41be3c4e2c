"""DenseNet-121 (Huang et al., 2017), in the spelling of ImageNet models and in that of CIFAR models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.model.architectures.spec import (
    HEADS,
    Architecture,
    Settings,
    Shapes,
    conv_shape,
    linear_shape,
    settings,
    spelling,
)

_BLOCKS = (6, 12, 24, 16)
_GROWTH = 32
_BOTTLENECK = 4


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 conv, norm, ReLU, 3x3 conv; its output is appended: ``[N, C, H, W] -> [N, C + growth, H, W]``.

    Args:
        dotted: names ``norm.1`` and ``conv.1`` (checkpoints of 2017) instead of ``norm1`` and ``conv1``.
    """

    def __init__(self, in_channels: int, growth: int, dotted: bool) -> None:
        super().__init__()
        inner = _BOTTLENECK * growth
        norms = (nn.BatchNorm2d(in_channels), nn.BatchNorm2d(inner))
        convs = (nn.Conv2d(in_channels, inner, 1, bias=False), nn.Conv2d(inner, growth, 3, padding=1, bias=False))
        self._names = ("norm.1", "conv.1", "norm.2", "conv.2") if dotted else ("norm1", "conv1", "norm2", "conv2")
        if dotted:
            self.norm, self.conv = (nn.ModuleDict({"1": a, "2": b}) for a, b in (norms, convs))
        else:
            self.norm1, self.conv1, self.norm2, self.conv2 = norms[0], convs[0], norms[1], convs[1]

    def forward(self, x: Tensor) -> Tensor:
        norm1, conv1, norm2, conv2 = (self.get_submodule(name) for name in self._names)
        y = conv2(functional.relu(norm2(conv1(functional.relu(norm1(x))))))
        return torch.cat([x, y], 1)


class DenseNet(nn.Module):
    """``[N, in_channels, H, W] -> [N, num_classes]``; names ``features.denseblock1.denselayer1.*``.

    Args:
        width: growth rate; the stem has twice as many channels.
        dotted: see ``DenseLayer``.
    """

    def __init__(
        self, num_classes: int = 1000, in_channels: int = 3, width: int = _GROWTH, dotted: bool = False
    ) -> None:
        super().__init__()
        channels = 2 * width
        features = nn.Sequential()
        features.add_module("conv0", nn.Conv2d(in_channels, channels, 7, 2, 3, bias=False))
        features.add_module("norm0", nn.BatchNorm2d(channels))
        features.add_module("relu0", nn.ReLU(inplace=True))
        features.add_module("pool0", nn.MaxPool2d(3, 2, 1))
        for index, depth in enumerate(_BLOCKS, 1):
            block = nn.Sequential()
            for position in range(1, depth + 1):
                block.add_module(f"denselayer{position}", DenseLayer(channels, width, dotted))
                channels += width
            features.add_module(f"denseblock{index}", block)
            if index < len(_BLOCKS):
                features.add_module(f"transition{index}", _transition(channels))
                channels //= 2
        features.add_module("norm5", nn.BatchNorm2d(channels))
        self.features = features
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.features(x))
        return self.classifier(functional.adaptive_avg_pool2d(y, 1).flatten(1))  # type: ignore[no-any-return]


def _transition(channels: int) -> nn.Sequential:
    """Norm, ReLU and a 1x1 conv that halves the channels, then a pooling that halves the image."""
    transition = nn.Sequential()
    transition.add_module("norm", nn.BatchNorm2d(channels))
    transition.add_module("relu", nn.ReLU(inplace=True))
    transition.add_module("conv", nn.Conv2d(channels, channels // 2, 1, bias=False))
    transition.add_module("pool", nn.AvgPool2d(2))
    return transition


class CifarDenseLayer(nn.Module):
    """The same layer with the new channels first."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, _BOTTLENECK * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(_BOTTLENECK * growth)
        self.conv2 = nn.Conv2d(_BOTTLENECK * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(functional.relu(self.bn1(x)))
        return torch.cat([self.conv2(functional.relu(self.bn2(y))), x], 1)


class CifarTransition(nn.Module):
    """Norm, ReLU and a 1x1 conv that halves the channels, then a pooling that halves the image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.avg_pool2d(self.conv(functional.relu(self.bn(x))), 2)


class CifarDenseNet(nn.Module):
    """``[N, in_channels, H, W] -> [N, num_classes]``, with a 3x3 stem; names ``dense1.0.bn1``, ``trans1.conv``.

    Args:
        width: growth rate; the stem has twice as many channels.
        head: name of the last layer in the state dict.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = _GROWTH, head: str = "linear") -> None:
        super().__init__()
        channels = 2 * width
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        for index, depth in enumerate(_BLOCKS, 1):
            layers = [CifarDenseLayer(channels + width * position, width) for position in range(depth)]
            self.add_module(f"dense{index}", nn.Sequential(*layers))
            channels += depth * width
            if index < len(_BLOCKS):
                self.add_module(f"trans{index}", CifarTransition(channels))
                channels //= 2
        self.bn = nn.BatchNorm2d(channels)
        self._head_name = head
        self.add_module(head, nn.Linear(channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        for index in range(1, len(_BLOCKS) + 1):
            y = getattr(self, f"dense{index}")(y)
            if index < len(_BLOCKS):
                y = getattr(self, f"trans{index}")(y)
        y = functional.adaptive_avg_pool2d(functional.relu(self.bn(y)), 1).flatten(1)
        return getattr(self, self._head_name)(y)  # type: ignore[no-any-return]


def _halved(stem: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
    """The stem's shape with the growth rate, half its channels, in their place."""
    return None if stem is None else (stem[0] // 2, stem[1], stem[2])


def _read(shapes: Shapes) -> Settings | None:
    dotted = "features.denseblock1.denselayer1.norm.1.weight" in shapes
    return settings(_halved(conv_shape(shapes, "features.conv0")), linear_shape(shapes, "classifier"), dotted=dotted)


def _read_cifar(shapes: Shapes) -> Settings | None:
    head = spelling(shapes, HEADS)
    return settings(_halved(conv_shape(shapes, "conv1")), linear_shape(shapes, head), head=head)


ARCHITECTURES = (
    Architecture("densenet121", DenseNet, _read, _GROWTH, 224, ("features.norm5.weight",)),
    Architecture("densenet121_cifar", CifarDenseNet, _read_cifar, _GROWTH, 32, ("dense4.15.conv2.weight",)),
)
