"""What the architectures have in common: convs that keep the size, stages of blocks, and the way to the logits."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional


def conv(
    in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A square conv that keeps the size of the image but for its stride."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=bias)


def conv_norm(
    activation: type[nn.Module] | None,
    in_channels: int,
    out_channels: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """A conv, its batch norm, and an activation unless there is none."""
    layers = [conv(in_channels, out_channels, kernel, stride, groups), nn.BatchNorm2d(out_channels)]
    return nn.Sequential(*layers, *([activation(inplace=True)] if activation else []))


def stage(
    block: Callable[[int, int, int], nn.Module], channels: int, out_channels: int, stride: int, depth: int
) -> list[nn.Module]:
    """``depth`` blocks, made of their input channels, output channels and stride; the first one changes the shape."""
    first = block(channels, out_channels, stride)
    return [first, *(block(out_channels, out_channels, 1) for _ in range(depth - 1))]


class Classifier(nn.Module):
    """A network that ends in means over the image and one layer, under the name that it has in the state dict."""

    _head_name: str

    def add_head(self, name: str, layer: nn.Module) -> None:
        """Registers the last layer."""
        self._head_name = name
        self.add_module(name, layer)

    def classify(self, maps: Tensor) -> Tensor:
        """Logits ``[N, K]`` of feature maps ``[N, C, H, W]``."""
        return getattr(self, self._head_name)(functional.adaptive_avg_pool2d(maps, 1).flatten(1))  # type: ignore[no-any-return]
