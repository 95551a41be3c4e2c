"""DenseNet-121 (Huang et al., 2017), with the parameter names of ImageNet models and of CIFAR models."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.model.architectures.layers import Classifier, conv
from bdprune.model.architectures.spec import Architecture, Settings, Shapes, read_cifar, read_layers

_BLOCKS = (6, 12, 24, 16)
_GROWTH = 32
_BOTTLENECK = 4


@dataclass(frozen=True)
class _Spelling:
    """Parameter names in the state dict.

    Attributes:
        block: name of a dense block, before its number.
        transition: name of the layers between two blocks, before their number.
        norm: name of the norm in a transition.
        layer: name of a layer in a block, before its number.
        first: number of the first layer.
        parts: names of norm, conv, norm and conv in a layer.
        appends: whether a layer's new channels come last.
    """

    block: str
    transition: str
    norm: str
    layer: str
    first: int
    parts: tuple[str, str, str, str]
    appends: bool


_IMAGENET = _Spelling(
    "denseblock", "transition", "norm", "denselayer", 1, ("norm1", "conv1", "norm2", "conv2"), appends=True
)
_DOTTED = replace(_IMAGENET, parts=("norm.1", "conv.1", "norm.2", "conv.2"))
_CIFAR = _Spelling("dense", "trans", "bn", "", 0, ("bn1", "conv1", "bn2", "conv2"), appends=False)


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 conv, norm, ReLU, 3x3 conv; appends its output as new channels: ``C -> C + growth``."""

    def __init__(self, in_channels: int, growth: int, spelled: _Spelling) -> None:
        super().__init__()
        inner = _BOTTLENECK * growth
        norms = (nn.BatchNorm2d(in_channels), nn.BatchNorm2d(inner))
        convs = (conv(in_channels, inner, 1), conv(inner, growth))
        self._spelled = spelled
        if "." in spelled.parts[0]:  # checkpoints of 2017
            self.norm, self.conv = (nn.ModuleDict({"1": one, "2": two}) for one, two in (norms, convs))
        else:
            for name, layer in zip(spelled.parts, (norms[0], convs[0], norms[1], convs[1]), strict=True):
                self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        norm1, conv1, norm2, conv2 = (self.get_submodule(name) for name in self._spelled.parts)
        y = conv2(functional.relu(norm2(conv1(functional.relu(norm1(x))))))
        return torch.cat([x, y] if self._spelled.appends else [y, x], 1)


def _dense_blocks(growth: int, spelled: _Spelling) -> tuple[dict[str, nn.Module], int]:
    """The dense blocks and the transitions between them, by name, and the output channels of the last block.

    A transition is a norm, ReLU and a 1x1 conv that halves the channels, and a pooling that halves the image.
    """
    channels = 2 * growth
    found: dict[str, nn.Module] = {}
    for index, depth in enumerate(_BLOCKS, 1):
        layers = (DenseLayer(channels + growth * number, growth, spelled) for number in range(depth))
        named = ((f"{spelled.layer}{number}", layer) for number, layer in enumerate(layers, spelled.first))
        found[f"{spelled.block}{index}"] = nn.Sequential(OrderedDict(named))
        channels += depth * growth
        if index < len(_BLOCKS):
            norm, halving = nn.BatchNorm2d(channels), conv(channels, channels // 2, 1)
            parts = {spelled.norm: norm, "relu": nn.ReLU(), "conv": halving, "pool": nn.AvgPool2d(2)}
            found[f"{spelled.transition}{index}"] = nn.Sequential(OrderedDict(parts))
            channels //= 2
    return found, channels


class DenseNet(Classifier):
    """``[N, in_channels, H, W] -> [N, num_classes]``; names ``features.denseblock1.denselayer1.*``.

    Args:
        width: growth rate; the stem has twice as many channels.
        dotted: names ``norm.1`` and ``conv.1`` (checkpoints of 2017) instead of ``norm1`` and ``conv1``.
    """

    def __init__(
        self, num_classes: int = 1000, in_channels: int = 3, width: int = _GROWTH, dotted: bool = False
    ) -> None:
        super().__init__()
        parts: dict[str, nn.Module] = {
            "conv0": conv(in_channels, 2 * width, 7, 2),
            "norm0": nn.BatchNorm2d(2 * width),
            "relu0": nn.ReLU(inplace=True),
            "pool0": nn.MaxPool2d(3, 2, 1),
        }
        blocks, channels = _dense_blocks(width, _DOTTED if dotted else _IMAGENET)
        self.features = nn.Sequential(OrderedDict(parts | blocks | {"norm5": nn.BatchNorm2d(channels)}))
        self.add_head("classifier", nn.Linear(channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(functional.relu(self.features(x)))


class CifarDenseNet(Classifier):
    """``[N, in_channels, H, W] -> [N, num_classes]``, with a 3x3 stem; names ``dense1.0.bn1``, ``trans1.conv``.

    Args:
        width: growth rate; the stem has twice as many channels.
        head: name of the last layer in the state dict.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = _GROWTH, head: str = "linear") -> None:
        super().__init__()
        self.conv1 = conv(in_channels, 2 * width)
        blocks, channels = _dense_blocks(width, _CIFAR)
        self._blocks = tuple(blocks)
        for name, block in blocks.items():
            self.add_module(name, block)
        self.bn = nn.BatchNorm2d(channels)
        self.add_head(head, nn.Linear(channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        for name in self._blocks:
            y = getattr(self, name)(y)
        return self.classify(functional.relu(self.bn(y)))


def _with_growth(found: Settings | None) -> Settings | None:
    """The growth rate is half of the stem's channels."""
    return found and {**found, "width": found["width"] // 2}


def _read(shapes: Shapes) -> Settings | None:
    found = _with_growth(read_layers(shapes, "features.conv0", "classifier"))
    return found and {**found, "dotted": "features.denseblock1.denselayer1.norm.1.weight" in shapes}


def _read_cifar(shapes: Shapes) -> Settings | None:
    return _with_growth(read_cifar(shapes))


ARCHITECTURES = (
    Architecture("densenet121", DenseNet, _read, _GROWTH, 224, ("features.norm5.weight",)),
    Architecture("densenet121_cifar", CifarDenseNet, _read_cifar, _GROWTH, 32, ("dense4.15.conv2.weight",)),
)
