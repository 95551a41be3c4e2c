"""Profiles RNP's optimiser steps by kind of operation.

python -m bench.speed.profile [--width 64] [--images 64] [--threads 1]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bdprune.loops import RecoverSettings, UnlearnSettings, recover, unlearn
from bench.speed.networks import clean_images, resnet18

KINDS = {
    "convolutions, backward": ("convolution_backward", "conv2d_input_grad", "conv2d_weight_grad"),
    "convolutions, forward": ("convolution", "conv2d"),
    "batch norm": ("batch_norm",),
    "activations, residual sums, pooling": ("relu", "threshold", "aten::add", "pool", "aten::mean", "aten::div"),
    "copies and finiteness checks": ("copy_", "clone", "aminmax", "isfinite", "_to_copy", "cat", "stack"),
    "augmentation": ("index", "pad", "randint", "randperm"),
    "optimiser": ("_foreach", "aten::mul_", "fused_sgd", "Optimizer"),
}
"""Words in the name of an operation. The first match counts; an operation without a match is ``other``."""

Shares = dict[str, float]


def profiles(width: int, images: int, device: torch.device) -> list[dict[str, Any]]:
    """Seconds of one unlearning pass and one recovery pass over the images, and each operation's share."""
    model, data = resnet18(width, device), clean_images(images, device)
    ascent = UnlearnSettings(weight_decay=5e-4, max_epochs=1, stop_accuracy=-1.0, stop_on="epoch", small_data=0)
    descent = RecoverSettings(loss_scale=0.2, epochs=1, small_data=0)
    phases: dict[str, Callable[[], Any]] = {
        "unlearning": lambda: unlearn(model, data, ascent),
        "recovery": lambda: recover(model, data, descent),
    }
    return [_profiled(f"{name} width {width}, {images} images", call, device) for name, call in phases.items()]


def kind(operation: str) -> str:
    """The kind of an operation, from its name in the profiler."""
    for name, words in KINDS.items():
        if any(word in operation for word in words):
            return name
    return "other"


def _profiled(name: str, call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as seen:
        call()
    spent: Shares = {}
    for event in seen.key_averages():
        # The profiler reports a kernel's time twice: for the kernel and for the operation that launched it.
        if cuda != (event.device_type == DeviceType.CUDA):
            continue
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        spent[kind(event.key)] = spent.get(kind(event.key), 0.0) + time / 1e6
    total = sum(spent.values())
    ordered = sorted(spent.items(), key=lambda item: -item[1])
    return {
        "phase": name,
        "seconds": float(f"{total:.4g}"),
        "percent": {part: float(f"{100 * seconds / total:.3g}") for part, seconds in ordered},
    }


def main() -> None:
    """Prints the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for found in profiles(options.width, options.images, torch.device(options.device)):
        print(f"{found['phase']}: {found['seconds']} s")
        for part, percent in found["percent"].items():
            print(f"  {percent:5.1f} %  {part}")


if __name__ == "__main__":
    main()
