"""Scans a large network with a time limit, and prints how long it took and what it did not look at.

    python bench/budget.py [--seconds 300] [--arch resnet50_imagenet] [--classes 1000] [--size 224] [--images 1000]

The network has random weights. Its last layer is fitted by least squares to one image of each class in turn, so that
it labels its images correctly and passes the check on them. The images are smooth noise.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import bdprune
from bdprune.model import build
from bdprune.process import keep_freed_memory

_BATCH = 32


def smooth_noise(count: int, size: int, seed: int = 0) -> Tensor:
    """``[count, 3, size, size]`` uint8: random colours on a coarse grid, enlarged."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 7, 7, generator=generator)
    parts = [functional.interpolate(part, size=(size, size), mode="bilinear") for part in coarse.split(_BATCH)]
    return torch.cat([(part * 255).round().to(torch.uint8) for part in parts])


@torch.no_grad()
def fitted(network: nn.Module, images: Tensor, labels: Tensor, classes: int) -> nn.Module:
    """The network with norms that fit the images, and a last layer that labels them correctly."""
    batches = [part.float() / 255 for part in images.split(_BATCH)]
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network(batches[0])
    network.eval()
    heads = [module for module in network.modules() if isinstance(module, nn.Linear)]
    seen: list[Tensor] = []
    hook = heads[-1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for batch in batches:
        network(batch)
    hook.remove()
    features = torch.cat(seen).double()
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-6)
    inputs = torch.cat([(features - mean) / scale, torch.ones(len(features), 1, dtype=torch.float64)], 1)
    wanted = functional.one_hot(labels, classes).double()
    weights = inputs.T @ torch.linalg.solve(inputs @ inputs.T + 1e-3 * torch.eye(len(inputs)), wanted)
    heads[-1].weight.copy_((weights[:-1].T / scale).float())
    heads[-1].bias.copy_((weights[-1] - (weights[:-1].T / scale) @ mean).float())
    return network


def prepare(folder: Path, arch: str, classes: int, size: int, count: int) -> tuple[Path, Path]:
    """Writes the checkpoint and the images; returns their paths."""
    torch.manual_seed(0)
    images, labels = smooth_noise(count, size), torch.arange(count) % classes
    network = fitted(build(arch, classes), images, labels, classes)
    torch.save(network.state_dict(), folder / "model.pth")
    np.savez(folder / "clean.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    return folder / "model.pth", folder / "clean.npz"


def main() -> None:
    """Prepares the files, scans, and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--arch", default="resnet50_imagenet")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=1000)
    asked = parser.parse_args()
    keep_freed_memory()  # as the command line does
    with tempfile.TemporaryDirectory() as folder:
        model, data = prepare(Path(folder), asked.arch, asked.classes, asked.size, asked.images)
        start = time.perf_counter()
        result = bdprune.scan(model, data, budget=asked.seconds, progress=print)
        took = time.perf_counter() - start
    print(f"{took:.1f} s of {asked.seconds:g} s: {result.verdict}")
    print(f"ran: {', '.join(f'{one.detector} ({one.seconds:.1f} s)' for one in result.detectors) or 'none'}")
    print(f"not run: {', '.join(result.not_run) or 'none'}")
    for one in result.findings:
        print(f"{one.rule_id} {one.severity}: {one.message}")
    if result.error:
        print(f"error: {result.error.message}")


if __name__ == "__main__":
    main()
