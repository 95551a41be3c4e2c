"""Pre-activation ResNet-18 and -34 for CIFAR (He et al., 2016b): norm and ReLU come before each conv."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from bdprune.model.architectures.layers import Classifier, conv, stages
from bdprune.model.architectures.spec import SHORTCUTS, Architecture, Settings, Shapes, read_cifar, spelling

BARE_SHORTCUT = "convShortcut"
"""A shortcut with this name is a plain conv; others are a sequence that holds one conv."""


class PreActBlock(nn.Module):
    """Two 3x3 convs after their norms: ``[N, in, H, W] -> [N, out, H/stride, W/stride]``.

    A shortcut that changes shape is a conv without a norm, and starts after the first activation.

    Args:
        shortcut: its name in the state dict.
        biased: the convs have biases, the second one has the stride, and the shortcut starts at the block's input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str, biased: bool = False) -> None:
        super().__init__()
        strides = (1, stride) if biased else (stride, 1)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, strides[0], bias=biased)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, strides[1], bias=biased)
        self._biased, self._shortcut_name = biased, ""
        if stride != 1 or in_channels != out_channels:
            short = conv(in_channels, out_channels, 1, stride, bias=biased)
            self.add_module(shortcut, short if shortcut == BARE_SHORTCUT else nn.Sequential(short))
            self._shortcut_name = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(x))
        short = getattr(self, self._shortcut_name)(x if self._biased else y) if self._shortcut_name else x
        return self.conv2(functional.relu(self.bn2(self.conv1(y)))) + short  # type: ignore[no-any-return]


class PreActNetwork(Classifier):
    """Runs ``conv1``, the stages, the last norm if there is one, and the last layer."""

    conv1: nn.Conv2d
    _stages: Sequence[str]
    _last_norm: str

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        for name in self._stages:
            y = getattr(self, name)(y)
        if self._last_norm:
            y = functional.relu(getattr(self, self._last_norm)(y))
        return self.classify(y)


class PreActResNet(PreActNetwork):
    """``[N, in_channels, H, W] -> [N, num_classes]``.

    Args:
        depths: number of blocks of each stage; every stage except the first halves the image.
        width: channels of the stem; stage i has width * 2^i.
        shortcut: name of the blocks' shortcut in the state dict.
        head: name of the last layer in the state dict.
        last_norm: name of a norm after the last stage; empty if there is none (as in most CIFAR code).
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
        self.conv1 = conv(in_channels, width)
        self._stages, self._last_norm = [f"layer{index}" for index in range(1, len(depths) + 1)], last_norm
        block = partial(PreActBlock, shortcut=shortcut)
        plan = [(block, width * 2**index, 2 if index else 1, depth) for index, depth in enumerate(depths)]
        for name, blocks in zip(self._stages, stages(width, plan), strict=True):
            self.add_module(name, nn.Sequential(*blocks))
        channels = plan[-1][1]
        if last_norm:
            self.add_module(last_norm, nn.BatchNorm2d(channels))
        self.add_head(head, nn.Linear(channels, num_classes))


def _read(shapes: Shapes) -> Settings | None:
    last_norm = next((name for name in ("bn", "bn1", "norm") if f"{name}.weight" in shapes), "")
    return read_cifar(shapes, shortcut=spelling(shapes, SHORTCUTS), last_norm=last_norm)


def _entry(layers: int, depths: Sequence[int]) -> Architecture:
    marks = (f"layer4.{depths[-1] - 1}.conv2.weight",)
    lacks = (f"layer4.{depths[-1]}.conv1.weight", "layer4.0.conv3.weight")
    return Architecture(f"preact_resnet{layers}", partial(PreActResNet, depths), _read, 64, 32, marks, lacks)


ARCHITECTURES = (_entry(18, (2, 2, 2, 2)), _entry(34, (3, 4, 6, 3)))
