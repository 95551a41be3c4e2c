"""Parts shared by the architectures: convs that keep the size, stages of blocks, and the classifier head."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.nn import functional


def conv(
    in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A square conv; only its stride changes the image size."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=bias)


def conv_norm(
    activation: type[nn.Module] | None,
    in_channels: int,
    out_channels: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """A conv, its batch norm, and an optional activation."""
    layers = [conv(in_channels, out_channels, kernel, stride, groups), nn.BatchNorm2d(out_channels)]
    return nn.Sequential(*layers, *([activation(inplace=True)] if activation else []))


Block = Callable[[int, int, int], nn.Module]
"""Makes a block of its input channels, output channels and stride."""


def stages(channels: int, plan: Iterable[tuple[Block, int, int, int]]) -> list[list[nn.Module]]:
    """Consecutive stages of blocks.

    Args:
        channels: input channels.
        plan: for each stage, its kind of block, its channels, the stride of its first block, and the number of blocks.
    """
    found = []
    for block, out_channels, stride, depth in plan:
        first = block(channels, out_channels, stride)
        found.append([first, *(block(out_channels, out_channels, 1) for _ in range(depth - 1))])
        channels = out_channels
    return found


class Classifier(nn.Module):
    """A network that ends in average pooling and one layer, registered under its name in the state dict."""

    _head_name: str

    def add_head(self, name: str, layer: nn.Module) -> None:
        """Registers the last layer."""
        self._head_name = name
        self.add_module(name, layer)

    def classify(self, maps: Tensor) -> Tensor:
        """Logits ``[N, K]`` of feature maps ``[N, C, H, W]``."""
        return getattr(self, self._head_name)(functional.adaptive_avg_pool2d(maps, 1).flatten(1))  # type: ignore[no-any-return]
