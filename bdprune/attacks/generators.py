"""Small networks for learned triggers: they map an image to values of the same height and width."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class EncoderDecoder(nn.Module):
    """Convolutions that halve the image, then restore its size: ``[N, in, H, W] -> [N, out, H, W]``, unbounded.

    H and W may be any sizes of at least ``2 ** (len(widths) - 1)``: the decoder uses the encoder's sizes. Each image
    is mapped independently (group norm, no running statistics), so training and inference are the same.

    Args:
        in_channels: of the image.
        out_channels: of the output.
        widths: channels at each resolution, full resolution first; each next one has half the height and width.
        skips: whether the decoder also gets the encoder's maps of its resolution (Ronneberger et al., 2015: U-Net).
            Otherwise all information passes through the smallest resolution.
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
    """Adds an image-dependent change of at most ``eps`` a pixel to each image ``[C, H, W]`` in [0, 1], and clips.

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
