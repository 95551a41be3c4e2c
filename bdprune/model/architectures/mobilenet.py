"""MobileNetV2 (Sandler et al., 2018), in the spelling of ImageNet models and in that of CIFAR models."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from bdprune.model.architectures.spec import (
    HEADS,
    Architecture,
    Settings,
    Shapes,
    conv_shape,
    linear_shape,
    rounded,
    settings,
    spelling,
)

# Expansion, output channels, blocks, stride of the first block.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM, _LAST = 32, 1280


def _conv_norm(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """Expansion (unless it is 1), depthwise 3x3, projection; a shortcut where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        layers: list[nn.Module] = [_conv_norm(in_channels, inner, 1)] if expansion != 1 else []
        layers.append(_conv_norm(inner, inner, 3, stride, groups=inner))
        layers += [nn.Conv2d(inner, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)]
        self.conv = nn.Sequential(*layers)
        self._adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self._adds else self.conv(x)  # type: ignore[no-any-return]


class MobileNetV2(nn.Module):
    """``[N, in_channels, H, W] -> [N, num_classes]``; names ``features.N.conv.*`` and ``classifier.1``.

    Args:
        width: channels of the stem; the multiplier of all channels is width / 32 (rounded to multiples of 8).
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, width: int = _STEM) -> None:
        super().__init__()
        factor = width / _STEM
        channels = rounded(width)
        layers: list[nn.Module] = [_conv_norm(in_channels, channels, 3, 2)]
        for expansion, planned, depth, stride in _STAGES:
            for position in range(depth):
                out_channels = rounded(planned * factor)
                layers.append(InvertedResidual(channels, out_channels, stride if position == 0 else 1, expansion))
                channels = out_channels
        last = rounded(_LAST * max(1.0, factor))
        layers.append(_conv_norm(channels, last, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        return self.classifier(y)  # type: ignore[no-any-return]


class CifarInvertedResidual(nn.Module):
    """Expansion, depthwise 3x3, projection, with ReLU; at stride 1 a shortcut, with a conv where channels change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride == 1 and in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )
        self._adds = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return y + self.shortcut(x) if self._adds else y  # type: ignore[no-any-return]


class CifarMobileNetV2(nn.Module):
    """``[N, in_channels, H, W] -> [N, num_classes]``, less subsampling; names ``layers.N.conv1`` to ``bn3``.

    Args:
        width: channels of the stem; the multiplier of all channels is width / 32.
        head: name of the last layer in the state dict.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = _STEM, head: str = "linear") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        channels = width
        for index, (expansion, planned, depth, stride) in enumerate(_STAGES):
            for position in range(depth):
                first_stride = 1 if index == 1 else stride
                out_channels = planned * width // _STEM
                strides = first_stride if position == 0 else 1
                blocks.append(CifarInvertedResidual(channels, out_channels, strides, expansion))
                channels = out_channels
        self.layers = nn.Sequential(*blocks)
        last = _LAST * width // _STEM
        self.conv2 = nn.Conv2d(channels, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self._head_name = head
        self.add_module(head, nn.Linear(last, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(functional.relu(self.bn1(self.conv1(x))))
        y = functional.adaptive_avg_pool2d(functional.relu(self.bn2(self.conv2(y))), 1).flatten(1)
        return getattr(self, self._head_name)(y)  # type: ignore[no-any-return]


def _read(shapes: Shapes) -> Settings | None:
    return settings(conv_shape(shapes, "features.0.0"), linear_shape(shapes, "classifier.1"))


def _read_cifar(shapes: Shapes) -> Settings | None:
    head = spelling(shapes, HEADS)
    return settings(conv_shape(shapes, "conv1"), linear_shape(shapes, head), head=head)


ARCHITECTURES = (
    Architecture("mobilenet_v2", MobileNetV2, _read, _STEM, 224, ("features.18.1.weight",)),
    Architecture("mobilenet_v2_cifar", CifarMobileNetV2, _read_cifar, _STEM, 32, ("layers.16.conv3.weight",)),
)
