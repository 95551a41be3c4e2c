"""Wide residual networks for CIFAR (Zagoruyko and Komodakis, 2016), with the two naming schemes in use."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import nn

from bdprune.model.architectures.layers import conv, stages
from bdprune.model.architectures.preact import BARE_SHORTCUT, PreActBlock, PreActNetwork
from bdprune.model.architectures.spec import Architecture, Settings, Shapes, read_cifar

# Widenings by depth.
PUBLISHED = {16: (1, 2, 4, 8), 22: (8,), 28: (2, 4, 10), 34: (10,), 40: (1, 2, 4)}


class WideResNet(PreActNetwork):
    """``[N, in_channels, H, W] -> [N, num_classes]``.

    Args:
        depth: 6n + 4 layers in three stages of n blocks.
        widen: stage i has width * widen * 2^i channels.
        width: channels of the stem, 16 in the paper.
        biased: the names ``layer1.0``, with biases; otherwise ``block1.layer.0``.
        head: name of the last layer in the state dict.
    """

    def __init__(
        self,
        depth: int,
        widen: int,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
        biased: bool = False,
        head: str = "fc",
    ) -> None:
        super().__init__()
        block = partial(PreActBlock, shortcut="shortcut" if biased else BARE_SHORTCUT, biased=biased)
        self.conv1 = conv(in_channels, width, bias=biased)
        self._stages, self._last_norm = [f"layer{index}" if biased else f"block{index}" for index in (1, 2, 3)], "bn1"
        plan = [(block, width * widen * 2**index, 2 if index else 1, (depth - 4) // 6) for index in range(3)]
        for name, layers in zip(self._stages, stages(width, plan), strict=True):
            blocks = nn.Sequential(*layers)
            self.add_module(name, blocks if biased else nn.Sequential(OrderedDict(layer=blocks)))
        channels = plan[-1][1]
        self.bn1 = nn.BatchNorm2d(channels)
        self.add_head(head, nn.Linear(channels, num_classes))


def _read(shapes: Shapes) -> Settings | None:
    return read_cifar(shapes, biased="conv1.bias" in shapes)


def _entry(depth: int, widen: int) -> Architecture:
    blocks = (depth - 4) // 6
    marks = (f"block3.layer.{blocks - 1}.conv2.weight", f"layer3.{blocks - 1}.conv2.bias")
    lacks = (f"block3.layer.{blocks}.conv2.weight", f"layer3.{blocks}.conv2.weight")
    return Architecture(f"wrn_{depth}_{widen}", partial(WideResNet, depth, widen), _read, 16, 32, marks, lacks)


ARCHITECTURES = tuple(_entry(depth, widen) for depth, widens in PUBLISHED.items() for widen in widens)
