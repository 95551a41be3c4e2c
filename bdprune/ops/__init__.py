"""The compiled ops behind one documented function each; plain PyTorch where they are not built (see ``_backend``)."""

from __future__ import annotations

from bdprune.ops._backend import backend
from bdprune.ops.mask import channel_scale, masked_conv2d, stacked_conv2d
from bdprune.ops.moments import ChannelMoments
from bdprune.ops.spectral import filter_spectral_norms
from bdprune.ops.winograd import winograd_conv2d

__all__ = [
    "ChannelMoments",
    "backend",
    "channel_scale",
    "filter_spectral_norms",
    "masked_conv2d",
    "stacked_conv2d",
    "winograd_conv2d",
]
