"""Wide residual networks for CIFAR (Zagoruyko and Komodakis, 2016), in the two spellings in circulation."""

from __future__ import annotations

from functools import partial

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

# Widenings by depth.
PUBLISHED = {16: (1, 2, 4, 8), 22: (8,), 28: (2, 4, 10), 34: (10,), 40: (1, 2, 4)}


class WideBlock(nn.Module):
    """Pre-activation block ``[N, in, H, W] -> [N, out, H/stride, W/stride]`` with names ``convShortcut``, no biases.

    Where the shape changes, the shortcut starts behind the first activation.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.convShortcut: nn.Module | None = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(x))
        short = x if self.convShortcut is None else self.convShortcut(y)
        return self.conv2(functional.relu(self.bn2(self.conv1(y)))) + short  # type: ignore[no-any-return]


class BiasedWideBlock(nn.Module):
    """The same with biases, the stride in the second conv, and a shortcut that starts at the block's input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, stride, 1)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(functional.relu(self.bn1(x)))
        return self.conv2(functional.relu(self.bn2(y))) + self.shortcut(x)  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """``[N, in_channels, H, W] -> [N, num_classes]``.

    Args:
        depth: 6n + 4 layers in three stages of n blocks.
        widen: stage i has width * widen * 2^i channels.
        width: channels of the stem, 16 in the paper.
        biased: the spelling ``layer1.0``, with biases; else ``block1.layer.0``.
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
        block = BiasedWideBlock if biased else WideBlock
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=biased)
        self._head_name = head
        self._stages = [f"layer{index}" if biased else f"block{index}" for index in (1, 2, 3)]
        channels = width
        for index, name in enumerate(self._stages):
            out_channels = width * widen * 2**index
            strides = [1 if index == 0 else 2] + [1] * ((depth - 4) // 6 - 1)
            ins = [channels] + [out_channels] * (len(strides) - 1)
            blocks = nn.Sequential(*(block(i, out_channels, s) for i, s in zip(ins, strides, strict=True)))
            self.add_module(name, blocks if biased else _Stage(blocks))
            channels = out_channels
        self.bn1 = nn.BatchNorm2d(channels)
        self.add_module(head, nn.Linear(channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        for name in self._stages:
            y = getattr(self, name)(y)
        y = functional.adaptive_avg_pool2d(functional.relu(self.bn1(y)), 1).flatten(1)
        return getattr(self, self._head_name)(y)  # type: ignore[no-any-return]


class _Stage(nn.Module):
    """A stage whose blocks are called ``layer``."""

    def __init__(self, layer: nn.Sequential) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def _read(shapes: Shapes) -> Settings | None:
    head = spelling(shapes, HEADS)
    biased = "conv1.bias" in shapes
    return settings(conv_shape(shapes, "conv1"), linear_shape(shapes, head), head=head, biased=biased)


def _entry(depth: int, widen: int) -> Architecture:
    blocks = (depth - 4) // 6
    marks = (f"block3.layer.{blocks - 1}.conv2.weight", f"layer3.{blocks - 1}.conv2.bias")
    lacks = (f"block3.layer.{blocks}.conv2.weight", f"layer3.{blocks}.conv2.weight")
    return Architecture(f"wrn_{depth}_{widen}", partial(WideResNet, depth, widen), _read, 16, 32, marks, lacks)


ARCHITECTURES = tuple(_entry(depth, widen) for depth, widens in PUBLISHED.items() for widen in widens)
