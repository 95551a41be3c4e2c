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
        images: clean images for moments and scores.
        conv_images: images of a batch in the masked convolution.
        rnp: (width, steps of 125 images that are timed, images of the sweep) of each ladder of RNP.
        rival_steps: iterations of the other methods that are timed.
        compile_methods: whether whole networks are compiled too, which takes a minute or more each on a CPU.
        seconds: how long an op's ladder is repeated; a method's ladder gets three times that.
        most: repeats at most.
        quick: tiny, to see that it works; its figures mean nothing.
    """

    device: torch.device
    width: int = 64
    images: int = 100
    conv_images: int = 128
    rnp: tuple[tuple[int, int, int], ...] = ((32, 1, 32), (64, 1, 16))
    rival_steps: int = 1
    compile_methods: bool = True
    seconds: float = 6.0
    most: int = 25
    quick: bool = False


def cpu_plan(threads: int) -> Plan:
    """A few steps of each method, scaled up; whole networks are compiled with one thread only."""
    return Plan(torch.device("cpu"), compile_methods=threads == 1)


def cuda_plan() -> Plan:
    """The same shapes with whole epochs."""
    return Plan(torch.device("cuda"), rnp=((32, 4, 150), (64, 4, 150)), rival_steps=20, seconds=4.0)


def quick_plan(device: torch.device) -> Plan:
    """Networks of width 4 and a handful of images."""
    return Plan(device, 4, 6, 4, ((4, 1, 8),), 1, False, 0.2, 3, True)
