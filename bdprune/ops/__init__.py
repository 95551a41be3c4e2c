"""The compiled ops, each behind a documented function; plain PyTorch if they are not built (see ``_backend``).

This file names everything that other packages of bdprune need.
"""

from __future__ import annotations

from bdprune.ops._backend import backend, build_info
from bdprune.ops.channel_moments import ChannelMoments
from bdprune.ops.channel_scale import channel_scale
from bdprune.ops.filter_spectral_norms import filter_spectral_norms
from bdprune.ops.masked_conv2d import masked_conv2d
from bdprune.ops.stacked_conv2d import stacked_conv2d
from bdprune.ops.stamp import stamp
from bdprune.ops.tuner import Choice, device_name, fastest, kept_choices, kept_file, settled
from bdprune.ops.winograd_conv2d import winograd_applies, winograd_conv2d, winograd_is_faster
from bdprune.ops.winograd_masked_conv2d import winograd_masked_conv2d

__all__ = [
    "ChannelMoments",
    "Choice",
    "backend",
    "build_info",
    "channel_scale",
    "device_name",
    "fastest",
    "filter_spectral_norms",
    "kept_choices",
    "kept_file",
    "masked_conv2d",
    "settled",
    "stacked_conv2d",
    "stamp",
    "winograd_applies",
    "winograd_conv2d",
    "winograd_is_faster",
    "winograd_masked_conv2d",
]
