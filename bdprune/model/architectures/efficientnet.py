"""EfficientNet-B0 (Tan and Le, 2019), with the parameter names of ImageNet models and of CIFAR models."""

from __future__ import annotations

from functools import partial
from itertools import chain

from torch import Tensor, nn
from torch.nn import functional

from bdprune.model.architectures.layers import Classifier, conv, conv_norm, stages
from bdprune.model.architectures.spec import Architecture, read_cifar, read_layers, rounded

# Expansion, kernel, stride of the first block, output channels, blocks.
_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
_STEM = 32


class SqueezeExcite(nn.Module):
    """Channel gates from the means of all channels: ``[N, C, H, W] -> [N, C, H, W]``."""

    def __init__(self, channels: int, squeezed: int, names: tuple[str, str] = ("fc1", "fc2")) -> None:
        super().__init__()
        self._names = names
        self.add_module(names[0], nn.Conv2d(channels, squeezed, 1))
        self.add_module(names[1], nn.Conv2d(squeezed, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (getattr(self, name) for name in self._names)
        gates = second(functional.silu(first(functional.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return x * gates  # type: ignore[no-any-return]


class MBConv(nn.Module):
    """Expansion (unless it is 1), depthwise conv, gates, projection; a shortcut if the shape does not change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, kernel: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.block = nn.Sequential(
            *([conv_norm(nn.SiLU, in_channels, inner)] if expansion != 1 else []),
            conv_norm(nn.SiLU, inner, inner, kernel, stride, groups=inner),
            SqueezeExcite(inner, max(1, in_channels // 4)),
            conv_norm(None, inner, out_channels),
        )
        self._adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self._adds else self.block(x)  # type: ignore[no-any-return]


class EfficientNet(Classifier):
    """``[N, in_channels, H, W] -> [N, num_classes]``; names ``features.S.B.block.*`` and ``classifier.1``.

    Stochastic depth is omitted: it only acts in training.

    Args:
        width: channels of the stem; the multiplier of all channels is width / 32 (rounded to multiples of 8).
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, width: int = _STEM) -> None:
        super().__init__()
        stem = conv_norm(nn.SiLU, in_channels, rounded(width), 3, 2)
        plan = [
            (partial(MBConv, kernel=kernel, expansion=expansion), rounded(planned * width / _STEM), stride, depth)
            for expansion, kernel, stride, planned, depth in _STAGES
        ]
        blocks, channels = (nn.Sequential(*stage) for stage in stages(rounded(width), plan)), plan[-1][1]
        self.features = nn.Sequential(stem, *blocks, conv_norm(nn.SiLU, channels, 4 * channels))
        self.add_head("classifier", nn.Sequential(nn.Dropout(0.2), nn.Linear(4 * channels, num_classes)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


class CifarMBConv(nn.Module):
    """The block of CIFAR checkpoints; with expansion 1 its first conv exists but is not used."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, kernel: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.conv1, self.bn1 = conv(in_channels, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, inner, kernel, stride, groups=inner), nn.BatchNorm2d(inner)
        self.se = SqueezeExcite(inner, max(1, in_channels // 4), ("se1", "se2"))
        self.conv3, self.bn3 = conv(inner, out_channels, 1), nn.BatchNorm2d(out_channels)
        self._expands, self._adds = expansion != 1, stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = functional.silu(self.bn1(self.conv1(x))) if self._expands else x
        y = self.se(functional.silu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        return y + x if self._adds else y  # type: ignore[no-any-return]


class CifarEfficientNet(Classifier):
    """``[N, in_channels, H, W] -> [N, num_classes]``; names ``layers.N.conv1`` to ``bn3`` and ``se``, no last conv.

    Args:
        width: channels of the stem; the multiplier of all channels is width / 32.
        head: name of the last layer in the state dict.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = _STEM, head: str = "linear") -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(in_channels, width), nn.BatchNorm2d(width)
        plan = [
            (partial(CifarMBConv, kernel=kernel, expansion=expansion), planned * width // _STEM, stride, depth)
            for expansion, kernel, stride, planned, depth in _STAGES
        ]
        self.layers = nn.Sequential(*chain.from_iterable(stages(width, plan)))
        self.add_head(head, nn.Linear(plan[-1][1], num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.layers(functional.silu(self.bn1(self.conv1(x)))))


_read = partial(read_layers, stem="features.0.0", head="classifier.1")
ARCHITECTURES = (
    Architecture("efficientnet_b0", EfficientNet, _read, _STEM, 224, ("features.8.1.weight",)),
    Architecture("efficientnet_b0_cifar", CifarEfficientNet, read_cifar, _STEM, 32, ("layers.15.se.se1.weight",)),
)
