"""A plain CNN without norms, like those of tutorials."""

from __future__ import annotations

import math

from torch import Tensor, nn

from bdprune.model.architectures.spec import Architecture, Settings, Shapes, conv_shape, linear_shape, settings


class PlainCnn(nn.Module):
    """Three pairs of 3x3 convs, each with ReLU; a pooling after each pair; one linear layer.

    ``[N, in_channels, H, W] -> [N, num_classes]`` with H = W = ``input_size``.

    Args:
        width: filters of the first pair; the others have 2 width and 4 width.
        input_size: height and width of the images, a multiple of 8.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 32, input_size: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for pair in range(3):
            for _ in range(2):
                out_channels = width * 2**pair
                layers += [nn.Conv2d(channels, out_channels, 3, padding=1), nn.ReLU(inplace=True)]
                # torch's default weights are small: without norms, training would start slowly.
                nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")  # type: ignore[arg-type]
                channels = out_channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * (input_size // 8) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


def _read(shapes: Shapes) -> Settings | None:
    stem, head = conv_shape(shapes, "features.0"), linear_shape(shapes, "classifier")
    if stem is None or head is None:
        return None
    return settings(stem, head, input_size=8 * max(math.isqrt(head[1] // (4 * stem[0])), 1))


ARCHITECTURES = (
    Architecture(
        "plain_cnn", PlainCnn, _read, 32, 32, ("features.12.weight",), ("features.1.weight", "features.14.weight")
    ),
)
