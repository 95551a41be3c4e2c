"""MobileNetV2 (Sandler et al., 2018), with the parameter names of ImageNet models and of CIFAR models."""

from __future__ import annotations

from functools import partial
from itertools import chain

from torch import Tensor, nn
from torch.nn import functional

from bdprune.model.architectures.layers import Classifier, conv, conv_norm, stages
from bdprune.model.architectures.spec import Architecture, read_cifar, read_layers, rounded

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
_CIFAR_STAGES = (_STAGES[0], (6, 24, 2, 1), *_STAGES[2:])
_STEM, _LAST = 32, 1280


class InvertedResidual(nn.Module):
    """Expansion (unless it is 1), depthwise 3x3, projection; a shortcut if the shape does not change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.conv = nn.Sequential(
            *([conv_norm(nn.ReLU6, in_channels, inner)] if expansion != 1 else []),
            conv_norm(nn.ReLU6, inner, inner, 3, stride, groups=inner),
            *conv_norm(None, inner, out_channels),
        )
        self._adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self._adds else self.conv(x)  # type: ignore[no-any-return]


class MobileNetV2(Classifier):
    """``[N, in_channels, H, W] -> [N, num_classes]``; names ``features.N.conv.*`` and ``classifier.1``.

    Args:
        width: channels of the stem; the multiplier of all channels is width / 32 (rounded to multiples of 8).
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, width: int = _STEM) -> None:
        super().__init__()
        factor, stem = width / _STEM, conv_norm(nn.ReLU6, in_channels, rounded(width), 3, 2)
        plan = [
            (partial(InvertedResidual, expansion=expansion), rounded(planned * factor), stride, depth)
            for expansion, planned, depth, stride in _STAGES
        ]
        layers = chain.from_iterable(stages(rounded(width), plan))
        last = rounded(_LAST * max(1.0, factor))
        self.features = nn.Sequential(stem, *layers, conv_norm(nn.ReLU6, plan[-1][1], last))
        self.add_head("classifier", nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


class CifarInvertedResidual(nn.Module):
    """Expansion, depthwise 3x3, projection, with ReLU; at stride 1 a shortcut, with a conv if the channels change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.conv1, self.bn1 = conv(in_channels, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride, groups=inner), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, out_channels, 1), nn.BatchNorm2d(out_channels)
        self._adds = stride == 1
        changes = self._adds and in_channels != out_channels
        self.shortcut = conv_norm(None, in_channels, out_channels) if changes else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return y + self.shortcut(x) if self._adds else y  # type: ignore[no-any-return]


class CifarMobileNetV2(Classifier):
    """``[N, in_channels, H, W] -> [N, num_classes]``, with less subsampling; names ``layers.N.conv1`` to ``bn3``.

    Args:
        width: channels of the stem; the multiplier of all channels is width / 32.
        head: name of the last layer in the state dict.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = _STEM, head: str = "linear") -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(in_channels, width), nn.BatchNorm2d(width)
        plan = [
            (partial(CifarInvertedResidual, expansion=expansion), planned * width // _STEM, stride, depth)
            for expansion, planned, depth, stride in _CIFAR_STAGES
        ]
        self.layers = nn.Sequential(*chain.from_iterable(stages(width, plan)))
        last = _LAST * width // _STEM
        self.conv2, self.bn2 = conv(plan[-1][1], last, 1), nn.BatchNorm2d(last)
        self.add_head(head, nn.Linear(last, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(functional.relu(self.bn1(self.conv1(x))))
        return self.classify(functional.relu(self.bn2(self.conv2(y))))


_read = partial(read_layers, stem="features.0.0", head="classifier.1")
ARCHITECTURES = (
    Architecture("mobilenet_v2", MobileNetV2, _read, _STEM, 224, ("features.18.1.weight",)),
    Architecture("mobilenet_v2_cifar", CifarMobileNetV2, read_cifar, _STEM, 32, ("layers.16.conv3.weight",)),
)
