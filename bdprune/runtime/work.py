"""The work of a forward pass: operations and time."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_ROUNDS = 5


@torch.no_grad()
def flops(module: nn.Module, image: Tensor) -> int:
    """Floating-point operations of one forward pass: two for each multiply-add of convs and matrix products.

    Args:
        module: images -> logits, in eval mode.
        image: ``[1, C, H, W]``.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        module(image)
    return int(counter.get_total_flops())


@torch.no_grad()
def milliseconds(modules: Sequence[nn.Module], images: Tensor) -> list[float]:
    """Time of each module per image: of five passes in turn, the fastest, so that other programs matter less.

    Args:
        modules: images -> logits, in eval mode.
        images: one batch ``[N, C, H, W]``.
    """
    best = [float("inf")] * len(modules)
    for module in modules:
        module(images)  # the first pass also allocates memory
    for _ in range(_ROUNDS):
        for index, module in enumerate(modules):
            _wait(images)
            began = time.perf_counter()
            module(images)
            _wait(images)
            best[index] = min(best[index], time.perf_counter() - began)
    return [1000 * seconds / len(images) for seconds in best]


def _wait(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
