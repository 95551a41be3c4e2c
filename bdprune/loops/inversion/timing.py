"""How long the steps of a search take, and how many images a time limit leaves."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from bdprune.data import CleanData
from bdprune.loops.inversion.settings import InvertSettings
from bdprune.runtime import FrozenNetworks

PASSES_IN_A_STEP = 2
"""Forward passes that take as long as one step of an image."""

_MEASURING = 0.2  # share of a time limit for the predictions on images outside the steps
_TRIAL, _TRIAL_IMAGES = 0.05, 64  # seconds and images of a trial that suffice
_LEAST = 20  # images of the search, and held-out ones, that a time limit leaves


def step_seconds(networks: FrozenNetworks, images: Tensor) -> float:
    """Seconds of one step of one image of one model, from a trial of enough images to take a moment."""
    count, took = 2, 0.0
    _timed_step(networks, images[:count])  # the first pass is slower
    while took < _TRIAL and count <= _TRIAL_IMAGES:
        few = images[torch.arange(count) % len(images)]
        took, tried, count = _timed_step(networks, few), count, 4 * count
    return took / (tried * networks.count)


def images_in_time(
    split: tuple[CleanData, CleanData], networks: FrozenNetworks, settings: InvertSettings, seconds: float
) -> tuple[CleanData, CleanData]:
    """As many images of the split as can be predicted in a share of the time."""
    each = step_seconds(networks, split[0].images) * networks.count / PASSES_IN_A_STEP
    passes = _MEASURING / 2 * seconds / each
    search, held = split
    times = settings.final.keep or 1
    return search.spread(max(_LEAST, int(passes))), held.spread(max(_LEAST, int(passes / times)))


def _timed_step(networks: FrozenNetworks, images: Tensor) -> float:
    """Seconds of a forward and a backward pass of these images on each model."""
    own = images.to(networks.device).repeat(networks.count, 1, 1, 1).contiguous(memory_format=networks.layout)
    start = time.perf_counter()
    networks.logits(own.detach().requires_grad_()).sum().backward()
    if networks.device.type == "cuda":
        torch.cuda.synchronize(networks.device)
    return time.perf_counter() - start
