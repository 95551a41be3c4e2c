"""Operations and time of forward passes."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from bdprune.runtime import flops, milliseconds


def test_a_multiply_add_is_two_operations() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
    assert flops(network, torch.rand(1, 3, 8, 8)) == 2 * (4 * 3 * 9 * 64 + 256 * 5)


def test_time_is_that_of_the_fastest_pass_per_image() -> None:
    class Sleep(nn.Module):
        def __init__(self, *seconds: float) -> None:
            super().__init__()
            self.seconds = list(seconds)

        def forward(self, x: Tensor) -> Tensor:
            time.sleep(self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0])
            return x

    slow, fast = milliseconds([Sleep(0.5, 0.2, 0.04), Sleep(0.01)], torch.rand(4, 1))
    assert 10 <= slow < 40 and 2.5 <= fast < slow
