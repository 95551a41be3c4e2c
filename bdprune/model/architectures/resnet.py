"""Residual networks (He et al., 2016), with CIFAR and ImageNet stems, and the names of published checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional

from bdprune.model.architectures.layers import Classifier, conv, conv_norm, stages
from bdprune.model.architectures.spec import SHORTCUTS, Architecture, Settings, Shapes, conv_shape, read_cifar, spelling

Stem = Literal["cifar", "imagenet"]


@dataclass(frozen=True)
class Layout:
    """The blocks of a network.

    Attributes:
        depths: number of blocks of each stage; every stage except the first halves the image.
        bottleneck: blocks of three convs instead of two, whose outer channels are four times the inner ones.
        stem: ``cifar`` is a 3x3 conv, ``imagenet`` a 7x7 conv of stride 2 and a pooling.
    """

    depths: tuple[int, ...]
    bottleneck: bool = False
    stem: Stem = "cifar"

    @property
    def convs(self) -> int:
        """Number of convs in a block."""
        return 3 if self.bottleneck else 2


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
    return conv_norm(None, in_channels, out_channels, 1, stride)


class ResidualBlock(nn.Module):
    """Convs and a shortcut, post-activation: ``[N, in, H, W] -> [N, out, H/stride, W/stride]``.

    Args:
        bottleneck: 1x1, 3x3 (with the stride) and 1x1 conv; otherwise two 3x3 convs.
        shortcut: name of the shortcut in the state dict.
        pad: whether a shortcut that changes shape pads (option A) instead of using a conv (option B).
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, bottleneck: bool, shortcut: str, pad: bool
    ) -> None:
        super().__init__()
        inner = out_channels // 4
        outer = [(in_channels, inner, 1, 1), (inner, inner, 3, stride), (inner, out_channels, 1, 1)]
        convs = outer if bottleneck else [(in_channels, out_channels, 3, stride), (out_channels, out_channels, 3, 1)]
        self._convs, self._shortcut_name = len(convs), shortcut
        for number, shape in enumerate(convs, 1):
            self.add_module(f"conv{number}", conv(*shape))
            self.add_module(f"bn{number}", nn.BatchNorm2d(shape[1]))
        self.add_module(shortcut, _shortcut(in_channels, out_channels, stride, pad))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number in range(1, self._convs + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            y = functional.relu(y, inplace=True) if number < self._convs else y
        return functional.relu(y + getattr(self, self._shortcut_name)(x), inplace=True)


class ResNet(Classifier):
    """Residual network: ``[N, in_channels, H, W] -> [N, num_classes]``.

    Args:
        layout: blocks and stem.
        width: channels of the stem; stage i has width * 2^i, four times as many with bottlenecks.
        shortcut: name of the blocks' shortcut in the state dict.
        head: name of the last layer in the state dict.
        pad: whether shortcuts pad (option A).
    """

    def __init__(
        self,
        layout: Layout,
        num_classes: int,
        in_channels: int = 3,
        width: int = 64,
        shortcut: str = "shortcut",
        head: str = "linear",
        pad: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, width, *((3, 1) if layout.stem == "cifar" else (7, 2)))
        self.bn1 = nn.BatchNorm2d(width)
        self._layout, outer = layout, width * (4 if layout.bottleneck else 1)
        block = partial(ResidualBlock, bottleneck=layout.bottleneck, shortcut=shortcut, pad=pad)
        plan = [(block, outer * 2**index, 2 if index else 1, depth) for index, depth in enumerate(layout.depths)]
        for number, blocks in enumerate(stages(width, plan), 1):
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.add_head(head, nn.Linear(plan[-1][1], num_classes))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        if self._layout.stem == "imagenet":
            y = functional.max_pool2d(y, 3, 2, 1)
        for number in range(1, len(self._layout.depths) + 1):
            y = getattr(self, f"layer{number}")(y)
        return self.classify(y)


class ResNet18Cifar(ResNet):
    """ResNet-18 with the 3x3 CIFAR stem: ``[N, in_channels, H, W] -> [N, num_classes]``.

    Args:
        width: channels of the stem; stages have width, 2 width, 4 width and 8 width. The paper's is 64.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 64, **spelled: Any) -> None:
        super().__init__(Layout((2, 2, 2, 2)), num_classes, in_channels, width, **spelled)


def _read(shapes: Shapes, kernel: int) -> Settings | None:
    stem = conv_shape(shapes, "conv1")
    if stem is None or stem[2] != kernel:
        return None
    return read_cifar(shapes, shortcut=spelling(shapes, SHORTCUTS))


def _read_small(shapes: Shapes) -> Settings | None:
    found = _read(shapes, 3)
    weighted = any(part in SHORTCUTS for name in shapes for part in name.split("."))
    return found and {**found, "pad": not weighted}


def _entry(depth: int, layout: Layout) -> Architecture:
    spelled: dict[str, Any] = {} if layout.stem == "cifar" else {"shortcut": "downsample", "head": "fc"}
    name = f"resnet{depth}_{layout.stem}"
    make = partial(ResNet, layout, **spelled) if name != "resnet18_cifar" else ResNet18Cifar
    kernel, size = (3, 32) if layout.stem == "cifar" else (7, 224)
    return Architecture(name, make, partial(_read, kernel=kernel), 64, size, *_marks(layout))


def _marks(layout: Layout) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The last conv of the last block, and the names that only a larger network has."""
    last, blocks, convs = len(layout.depths), layout.depths[-1], layout.convs
    beyond = (f"layer{last}.{blocks}.conv1", f"layer{last + 1}.0.conv1", f"layer1.0.conv{convs + 1}")
    return (f"layer{last}.{blocks - 1}.conv{convs}.weight",), tuple(f"{name}.weight" for name in beyond)


def _small(depth: int) -> Architecture:
    """The paper's CIFAR networks of 6n + 2 layers in three stages."""
    layout = Layout(((depth - 2) // 6,) * 3)
    make = partial(ResNet, layout, pad=True)
    return Architecture(f"resnet{depth}_cifar", make, _read_small, 16, 32, *_marks(layout))


_STEMS: tuple[Stem, ...] = ("cifar", "imagenet")
_DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
ARCHITECTURES = (
    *(_entry(depth, Layout(depths, depth == 50, stem)) for stem in _STEMS for depth, depths in _DEPTHS.items()),
    *(_small(depth) for depth in (20, 32, 44, 56, 110)),
)
