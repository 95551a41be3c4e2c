"""The memory layout that a network trains in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def training_layout(network: nn.Module) -> torch.memory_format:
    """channels_last, which is the faster one, wherever its backward pass is sound.

    In torch 2.13, oneDNN's gradient of a strided 1x1 convolution in channels_last writes beyond its memory where the
    input has fewer channels than a vector register has floats: the process dies at some later allocation, or works on
    with spoiled values. Networks with such a convolution stay contiguous, except on CUDA, which has no oneDNN.
    """
    on_cuda = any(parameter.device.type == "cuda" for parameter in network.parameters())
    if not on_cuda and any(map(_is_mangled, network.modules())):
        return torch.contiguous_format
    return torch.channels_last


def laid_out(images: Tensor, layout: torch.memory_format) -> Tensor:
    """Images ``[N, C, H, W]`` in that layout, down to their strides.

    The strides of one channel mean nothing, so that a grey image in channels_last counts as contiguous and stays as it
    is; but convolutions go by them, and would hand on channels_last to the whole network.
    """
    images = images.contiguous(memory_format=layout)
    return images.flatten().view(images.shape) if layout is torch.contiguous_format else images


def _is_mangled(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d) or module.kernel_size != (1, 1) or max(module.stride) == 1:
        return False
    floats = 8 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 16
    return module.in_channels // module.groups < floats
