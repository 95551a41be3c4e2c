"""Pre-activation ResNet-18 and -34 for CIFAR (He et al., 2016b): norm and ReLU stand before each conv."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

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


class PreActBlock(nn.Module):
    """Two 3x3 convs behind their norms: ``[N, in, H, W] -> [N, out, H/stride, W/stride]``.

    A shortcut that changes shape is a conv without a norm, and starts behind the first activation.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self._shortcut_name = ""
        if stride != 1 or in_channels != out_channels:
            self.add_module(shortcut, nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)))
            self._shortcut_name = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(x))
        short = getattr(self, self._shortcut_name)(y) if self._shortcut_name else x
        return self.conv2(functional.relu(self.bn2(self.conv1(y)))) + short  # type: ignore[no-any-return]


class PreActResNet(nn.Module):
    """``[N, in_channels, H, W] -> [N, num_classes]``.

    Args:
        depths: number of blocks of each stage; each stage but the first halves the image.
        width: channels of the stem; stage i has width * 2^i.
        shortcut: name of the blocks' shortcut in the state dict.
        head: name of the last layer in the state dict.
        last_norm: name of a norm behind the last stage, empty when there is none (as in most CIFAR code).
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 64,
        shortcut: str = "shortcut",
        head: str = "linear",
        last_norm: str = "",
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self._depth, self._head_name, self._last_norm = len(depths), head, last_norm
        channels = width
        for index, depth in enumerate(depths):
            blocks = []
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(PreActBlock(channels, width * 2**index, stride, shortcut))
                channels = width * 2**index
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        if last_norm:
            self.add_module(last_norm, nn.BatchNorm2d(channels))
        self.add_module(head, nn.Linear(channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        for index in range(self._depth):
            y = getattr(self, f"layer{index + 1}")(y)
        if self._last_norm:
            y = functional.relu(getattr(self, self._last_norm)(y))
        return getattr(self, self._head_name)(functional.adaptive_avg_pool2d(y, 1).flatten(1))  # type: ignore[no-any-return]


def _read(shapes: Shapes) -> Settings | None:
    head = spelling(shapes, HEADS)
    return settings(
        conv_shape(shapes, "conv1"),
        linear_shape(shapes, head),
        head=head,
        shortcut=spelling(shapes, SHORTCUTS),
        last_norm=next((name for name in ("bn", "bn1", "norm") if f"{name}.weight" in shapes), ""),
    )


def _entry(layers: int, depths: Sequence[int]) -> Architecture:
    marks = (f"layer4.{depths[-1] - 1}.conv2.weight",)
    lacks = (f"layer4.{depths[-1]}.conv1.weight", "layer4.0.conv3.weight")
    return Architecture(f"preact_resnet{layers}", partial(PreActResNet, depths), _read, 64, 32, marks, lacks)


ARCHITECTURES = (_entry(18, (2, 2, 2, 2)), _entry(34, (3, 4, 6, 3)))
