"""How much is measured: sizes and repeats for a CPU, for a GPU, and for a glance at whether it all works."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Plan:
    """Sizes of all ladders.

    Attributes:
        device: where everything runs.
        width: channels of the stem of ResNet-18 and VGG-19-BN in the ladders of ops.
        images: clean images for moments.
        score_images: clean images for scores.
        conv_images: images of a batch in the masked convolution.
        rnp: (width, images of the steps that are timed, images of the sweep) of each ladder of RNP.
        stack: (models, width, images of a batch) of each ladder of a stack.
        rival_steps: iterations of the other methods that are timed.
        complete: with what takes long for one row: compiling, and other methods.
        seconds: how long an op's ladder is repeated; a method's ladder gets three times that.
        most: repeats at most.
        quick: tiny, to see that it works; its figures mean nothing.
    """

    device: torch.device
    width: int = 64
    images: int = 100
    score_images: int = 100
    conv_images: int = 128
    rnp: tuple[tuple[int, int, int], ...] = ((32, 64, 32), (64, 32, 16))
    stack: tuple[tuple[int, int, int], ...] = ((4, 16, 32),)
    rival_steps: int = 1
    complete: bool = True
    seconds: float = 4.0
    most: int = 25
    quick: bool = False


def cpu_plan(threads: int, complete: bool) -> Plan:
    """A part of a step of each method, scaled up; fewer images for scores with one thread."""
    return Plan(torch.device("cpu"), score_images=30 if threads == 1 else 100, complete=complete)


def cuda_plan() -> Plan:
    """The same shapes with whole epochs."""
    stack = tuple((64, width, 128) for width in (16, 32, 64))
    return Plan(torch.device("cuda"), rnp=((32, 500, 150), (64, 500, 150)), stack=stack, rival_steps=20)


def quick_plan(device: torch.device) -> Plan:
    """Networks of width 8 and a handful of images.

    Narrower ones crash torch 2.13 on AVX2: the weight gradient of a strided 1x1 convolution with fewer than eight
    inputs writes beyond its memory in channels_last.
    """
    return Plan(device, 8, 6, 6, 4, ((8, 8, 8),), ((2, 8, 8),), 1, complete=False, seconds=0.2, most=3, quick=True)
