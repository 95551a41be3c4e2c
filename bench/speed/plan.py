"""Sizes and repeats of the benchmarks: for a CPU, for a GPU, and for a quick check."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Plan:
    """Sizes of all benchmarks.

    Attributes:
        device: device of all benchmarks.
        width: stem channels of ResNet-18 and VGG-19-BN in the benchmarks of ops.
        images: clean images for moments.
        score_images: clean images for scores.
        conv_images: images per batch of a convolution.
        rnp: (width, images in the timed steps, images in the sweep) of each benchmark of RNP.
        stack: (models, width, images per batch) of each benchmark of a stack.
        alternative_steps: timed iterations of each alternative method.
        complete: include the slow rows: ``torch.compile`` and the alternative methods.
        seconds: time to repeat the benchmark of an op; a method gets three times as long.
        most: the most repeats of one variant.
        quick: tiny shapes that only check that everything runs; the figures mean nothing.
    """

    device: torch.device
    width: int = 64
    images: int = 100
    score_images: int = 100
    conv_images: int = 128
    rnp: tuple[tuple[int, int, int], ...] = ((32, 64, 32), (64, 32, 16))
    stack: tuple[tuple[int, int, int], ...] = ((4, 16, 32),)
    alternative_steps: int = 1
    complete: bool = True
    seconds: float = 4.0
    most: int = 25
    quick: bool = False


def cpu_plan(threads: int, complete: bool) -> Plan:
    """Times part of an optimiser step of each method and scales it up. One thread scores fewer images."""
    return Plan(torch.device("cpu"), score_images=30 if threads == 1 else 100, complete=complete)


def cuda_plan() -> Plan:
    """The same shapes as on a CPU, with whole epochs."""
    stack = tuple((64, width, 128) for width in (16, 32, 64))
    return Plan(torch.device("cuda"), rnp=((32, 500, 150), (64, 500, 150)), stack=stack, alternative_steps=20)


def quick_plan(device: torch.device) -> Plan:
    """Networks of width 8 and a handful of images.

    Narrower networks crash torch 2.13 on AVX2: in channels_last, the weight gradient of a strided 1x1 convolution with
    fewer than eight input channels writes out of bounds.
    """
    return Plan(device, 8, 6, 6, 4, ((8, 8, 8),), ((2, 8, 8),), 1, complete=False, seconds=0.2, most=3, quick=True)
