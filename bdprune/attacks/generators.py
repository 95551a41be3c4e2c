"""Small networks that learned triggers are made of: an image goes in, numbers of the same height and width come out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class EncoderDecoder(nn.Module):
    """Convs that halve the image, convs that bring its size back: ``[N, in, H, W] -> [N, out, H, W]``, unbounded.

    Any H and W of at least ``2 ** (len(widths) - 1)``: the way up takes the sizes that the way down had. Every image is
    mapped for itself (group norm, no running statistics), so there is no difference between training and use.

    Args:
        in_channels: of the image.
        out_channels: of what comes out.
        widths: channels at each resolution, the full one first; each next has half the height and width.
        skips: whether the way up also sees what the way down had at its resolution (Ronneberger et al., 2015: U-Net).
            Without them everything passes through the smallest resolution.
    """

    def __init__(self, in_channels: int, out_channels: int, widths: Sequence[int] = (16, 32, 64), skips: bool = False):
        super().__init__()
        self.skips = skips
        self.stem = _block(in_channels, widths[0], 1)
        pairs = list(itertools.pairwise(widths))
        self.down = nn.ModuleList(_block(wide, narrow, 2) for wide, narrow in pairs)
        self.up = nn.ModuleList(_block(narrow + wide * skips, wide, 1) for wide, narrow in reversed(pairs))
        self.last = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        passed = [self.stem(images)]
        for block in self.down:
            passed.append(block(passed[-1]))
        y = passed.pop()
        for block in self.up:
            same_size = passed.pop()
            y = functional.interpolate(y, size=same_size.shape[-2:], mode="nearest")
            y = block(torch.cat([y, same_size], 1) if self.skips else y)
        return self.last(y)  # type: ignore[no-any-return]


def _block(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(min(4, out_channels), out_channels), nn.ReLU(inplace=True))


class Change(nn.Module):
    """Adds to each image ``[C, H, W]`` in [0, 1] a change of its own of at most ``eps`` a pixel, and clips.

    Args:
        channels: C.
        width: channels of its U-Net at full resolution.
        eps: largest change of a pixel.
    """

    def __init__(self, channels: int, width: int, eps: float) -> None:
        super().__init__()
        self.change = EncoderDecoder(channels, channels, (width, 2 * width, 4 * width), skips=True)
        self.eps = eps

    def forward(self, images: Tensor) -> Tensor:
        return (images + self.eps * self.change(images).tanh()).clamp(0, 1)  # type: ignore[no-any-return]
