"""The six-conv network of the I-BAU checkpoints (Zeng et al., 2022), and the same with norms after the activations."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn

from bdprune.model.architectures.spec import Architecture, Settings, Shapes, conv_shape, linear_shape, settings


class IbauCnn(nn.Module):
    """Three pairs of 3x3 convs, each with batch norm and ELU; pooling and dropout after each pair; one linear layer.

    ``[N, in_channels, H, W] -> [N, num_classes]`` with H = W = ``input_size``.

    Attributes:
        norm_first: whether a batch norm comes before its ELU.

    Args:
        width: filters of the first pair; the others have 2 width and 4 width.
        input_size: height and width of the images, a multiple of 8.
    """

    norm_first: ClassVar[bool] = True

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 32, input_size: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for pair, dropout in enumerate((0.2, 0.3, 0.4)):
            for _ in range(2):
                out_channels = width * 2**pair
                pair_of = [nn.BatchNorm2d(out_channels), nn.ELU()]
                layers += [nn.Conv2d(channels, out_channels, 3, padding=1), *pair_of[:: 1 if self.norm_first else -1]]
                channels = out_channels
            layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * (input_size // 8) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


class EluNormCnn(IbauCnn):
    """The network with each batch norm after its ELU."""

    norm_first: ClassVar[bool] = False


def _read(shapes: Shapes) -> Settings | None:
    stem, head = conv_shape(shapes, "features.0"), linear_shape(shapes, "classifier")
    if stem is None or head is None:
        return None
    return settings(stem, head, input_size=8 * max(math.isqrt(head[1] // (4 * stem[0])), 1))


ARCHITECTURES = (
    Architecture(
        "ibau_cnn", IbauCnn, _read, 32, 32, ("features.19.weight",), ("features.22.weight", "features.2.weight")
    ),
    Architecture(
        "elu_norm_cnn", EluNormCnn, _read, 32, 32, ("features.21.weight",), ("features.22.weight", "features.1.weight")
    ),
)
