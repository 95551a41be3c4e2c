"""Residual networks (He et al., 2016), with CIFAR and ImageNet stems, in the spellings of published checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.nn import functional

from bdprune.model.architectures.spec import (
    HEADS,
    SHORTCUTS,
    Architecture,
    Settings,
    Shapes,
    conv_shape,
    linear_shape,
    settings,
    spelling,
)

Stem = Literal["cifar", "imagenet"]


class PadShortcut(nn.Module):
    """Option A of the paper: subsampling, and zeros for the new channels (half of them on either side)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def _shortcut(in_channels: int, out_channels: int, stride: int, pad: bool) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    if pad:
        return PadShortcut(in_channels, out_channels, stride)
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convs and a shortcut, post-activation: ``[N, in, H, W] -> [N, out, H/stride, W/stride]``.

    Args:
        shortcut: name of the shortcut in the state dict.
        pad: whether a shortcut that changes shape pads (option A) instead of having a conv of its own (option B).
    """

    expansion = 1

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, shortcut: str = "shortcut", pad: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.add_module(shortcut, _shortcut(in_channels, out_channels, stride, pad))
        self._shortcut_name = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(self.bn2(self.conv2(y)) + getattr(self, self._shortcut_name)(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 conv and a shortcut: ``[N, in, H, W] -> [N, out, H/stride, W/stride]``."""

    expansion = 4

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, shortcut: str = "shortcut", pad: bool = False
    ) -> None:
        super().__init__()
        inner = out_channels // self.expansion
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.add_module(shortcut, _shortcut(in_channels, out_channels, stride, pad))
        self._shortcut_name = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = functional.relu(self.bn2(self.conv2(y)), inplace=True)
        return functional.relu(self.bn3(self.conv3(y)) + getattr(self, self._shortcut_name)(x), inplace=True)


_Block: TypeAlias = type[BasicBlock] | type[Bottleneck]


class ResNet(nn.Module):
    """Residual network: ``[N, in_channels, H, W] -> [N, num_classes]``.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        depths: number of blocks of each stage; each stage but the first halves the image.
        width: channels of the stem; stage i has width * 2^i (times the block's expansion).
        stem: ``cifar`` is a 3x3 conv, ``imagenet`` a 7x7 conv of stride 2 and a pooling.
        shortcut: name of the blocks' shortcut in the state dict.
        head: name of the last layer in the state dict.
        pad: shortcuts by padding (option A).
    """

    def __init__(
        self,
        block: _Block,
        depths: Sequence[int],
        num_classes: int,
        in_channels: int = 3,
        width: int = 64,
        stem: Stem = "cifar",
        shortcut: str = "shortcut",
        head: str = "linear",
        pad: bool = False,
    ) -> None:
        super().__init__()
        kernel, stride = (3, 1) if stem == "cifar" else (7, 2)
        self.conv1 = nn.Conv2d(in_channels, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self._pools, self._depth, self._head_name = stem == "imagenet", len(depths), head
        channels = width
        for index, depth in enumerate(depths):
            out_channels = width * 2**index * block.expansion
            strides = [1 if index == 0 else 2] + [1] * (depth - 1)
            blocks = []
            for stride in strides:
                blocks.append(block(channels, out_channels, stride, shortcut, pad))
                channels = out_channels
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.add_module(head, nn.Linear(channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        if self._pools:
            y = functional.max_pool2d(y, 3, 2, 1)
        for index in range(self._depth):
            y = getattr(self, f"layer{index + 1}")(y)
        return getattr(self, self._head_name)(functional.adaptive_avg_pool2d(y, 1).flatten(1))  # type: ignore[no-any-return]


class ResNet18Cifar(ResNet):
    """ResNet-18 with the 3x3 CIFAR stem: ``[N, in_channels, H, W] -> [N, num_classes]``.

    Args:
        width: channels of the stem; stages have width, 2 width, 4 width and 8 width. The paper's is 64.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 64, **spelled: Any) -> None:
        super().__init__(BasicBlock, (2, 2, 2, 2), num_classes, in_channels, width, **spelled)


def _read(shapes: Shapes, kernel: int) -> Settings | None:
    stem, head = conv_shape(shapes, "conv1"), spelling(shapes, HEADS)
    if stem is None or stem[2] != kernel:
        return None
    return settings(stem, linear_shape(shapes, head), head=head, shortcut=spelling(shapes, SHORTCUTS))


def _read_small(shapes: Shapes) -> Settings | None:
    found = _read(shapes, 3)
    weighted = any(part in SHORTCUTS for name in shapes for part in name.split("."))
    return None if found is None else {**found, "pad": not weighted}


def _entry(name: str, block: _Block, depths: Sequence[int], stem: Stem) -> Architecture:
    spelled: dict[str, Any] = {} if stem == "cifar" else {"stem": stem, "shortcut": "downsample", "head": "fc"}
    make = partial(ResNet, block, depths, **spelled) if name != "resnet18_cifar" else ResNet18Cifar
    kernel, size = (3, 32) if stem == "cifar" else (7, 224)
    return Architecture(name, make, partial(_read, kernel=kernel), 64, size, *_marks(block, depths))


def _marks(block: _Block, depths: Sequence[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The last conv of the last block, and what would come after it."""
    stage, conv = len(depths), 2 if block is BasicBlock else 3
    beyond = (f"layer{stage}.{depths[-1]}.conv1", f"layer{stage + 1}.0.conv1", f"layer1.0.conv{conv + 1}")
    return (f"layer{stage}.{depths[-1] - 1}.conv{conv}.weight",), tuple(f"{name}.weight" for name in beyond)


def _small(depth: int) -> Architecture:
    """The paper's CIFAR networks of 6n + 2 layers in three stages."""
    depths = ((depth - 2) // 6,) * 3
    make = partial(ResNet, BasicBlock, depths, pad=True)
    return Architecture(f"resnet{depth}_cifar", make, _read_small, 16, 32, *_marks(BasicBlock, depths))


_LAYERS: dict[int, tuple[_Block, tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}
_STEMS: tuple[Stem, ...] = ("cifar", "imagenet")
ARCHITECTURES = (
    *(_entry(f"resnet{depth}_{stem}", *layers, stem) for stem in _STEMS for depth, layers in _LAYERS.items()),
    *(_small(depth) for depth in (20, 32, 44, 56, 110)),
)
