"""VGG with batch norm (Simonyan and Zisserman, 2015), for ImageNet and with the small CIFAR heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from bdprune.model.architectures import spec

# Convs of each of the five stages; a stage ends with a pooling.
_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_WIDTHS = (1, 2, 4, 8, 8)


@dataclass(frozen=True)
class Head:
    """The layers after the convs.

    Attributes:
        positions: positions of the linear layers in ``classifier`` (ReLUs and dropouts are between them); empty if
            ``classifier`` is one linear layer.
        hidden: outputs of every linear layer except the last.
        spatial: height and width of its input map; the features are averaged to that size.
    """

    positions: tuple[int, ...] = ()
    hidden: int = 4096
    spatial: int = 1

    def layers(self, channels: int, num_classes: int) -> nn.Module:
        """Linear layers with a ReLU directly after each except the last, and dropouts in the other positions."""
        inputs = channels * self.spatial**2
        if not self.positions:
            return nn.Linear(inputs, num_classes)
        layers = nn.Sequential()
        for position in range(self.positions[-1] + 1):
            if position in self.positions:
                outputs = num_classes if position == self.positions[-1] else self.hidden
                layers.append(nn.Linear(inputs, outputs))
                inputs = outputs
            else:
                layers.append(nn.ReLU(inplace=True) if position - 1 in self.positions else nn.Dropout())
        return layers


class VGG(nn.Module):
    """``[N, in_channels, H, W] -> [N, num_classes]``; H and W at least 32.

    Args:
        stages: number of 3x3 convs of each of the five stages.
        width: filters of the first stage; the others have 2, 4, 8 and 8 times as many.
        head: the linear layers.
        bias: whether the convs have biases.
    """

    def __init__(
        self,
        stages: Sequence[int],
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 64,
        head: Head = Head(),
        bias: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for depth, factor in zip(stages, _WIDTHS, strict=True):
            for _ in range(depth):
                layers.append(nn.Conv2d(channels, width * factor, 3, padding=1, bias=bias))
                layers += [nn.BatchNorm2d(width * factor), nn.ReLU(inplace=True)]
                channels = width * factor
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self._spatial = head.spatial
        self.classifier = head.layers(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.adaptive_avg_pool2d(self.features(x), self._spatial)
        return self.classifier(y.flatten(1))  # type: ignore[no-any-return]


def _read(shapes: spec.Shapes, small: bool) -> spec.Settings | None:
    positions = tuple(spec.numbered(shapes, r"classifier\.(\d+)\.weight"))
    names = [f"classifier.{position}" for position in positions] or ["classifier"]
    stem = spec.conv_shape(shapes, "features.0")
    first, last = spec.linear_shape(shapes, names[0]), spec.linear_shape(shapes, names[-1])
    if stem is None or first is None or len(positions) > 10 or max(positions, default=0) > 20:
        return None
    spatial = math.isqrt(first[1] // (_WIDTHS[-1] * stem[0]))
    if (spatial == 1) != small:
        return None
    head = Head(positions, first[0], spatial)
    return spec.settings(stem, last, head=head, bias="features.0.bias" in shapes)


def _entry(depth: int, small: bool) -> spec.Architecture:
    name = f"vgg{depth}_bn_cifar" if small else f"vgg{depth}_bn"
    make = partial(VGG, _STAGES[depth]) if small else partial(VGG, _STAGES[depth], head=Head((0, 3, 6), spatial=7))
    last = 3 * sum(_STAGES[depth]) + len(_STAGES[depth]) - 4  # position of the last conv in ``features``
    marks, lacks = (f"features.{last}.weight",), (f"features.{last + 3}.weight",)
    return spec.Architecture(name, make, partial(_read, small=small), 64, 32 if small else 224, marks, lacks)


ARCHITECTURES = tuple(_entry(depth, small) for small in (False, True) for depth in _STAGES)
