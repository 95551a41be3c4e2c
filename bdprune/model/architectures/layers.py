"""What the architectures have in common: convs that keep the size, stages of blocks, and the way to the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable

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


Block = Callable[[int, int, int], nn.Module]
"""Makes a block of its input channels, output channels and stride."""


def stages(channels: int, plan: Iterable[tuple[Block, int, int, int]]) -> list[list[nn.Module]]:
    """The blocks of stages that follow each other.

    Args:
        channels: that come in.
        plan: of each stage its kind of block, its channels, the stride of its first block, and the number of blocks.
    """
    found = []
    for block, out_channels, stride, depth in plan:
        first = block(channels, out_channels, stride)
        found.append([first, *(block(out_channels, out_channels, 1) for _ in range(depth - 1))])
        channels = out_channels
    return found


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
