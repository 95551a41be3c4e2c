"""Spectral norms of all filters of a CIFAR ResNet-18: the published loop, the best eager PyTorch, ours, and the floor.

    python bench/spectral_norms.py [--width 64] [--threads 1] [--repeats 9] [--device cpu] [--clock wall]
                                   [--json results.json]

Every rung works on the same float32 weights; the error column is the largest relative error against float64 singular
values. The rungs take turns within each round and the least time of all rounds counts, so a busy machine hurts them
alike. On a shared machine ``--clock cpu`` (one thread only) leaves out the time that others were given. The floor reads
every weight once.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from bdprune.ops import _backend, filter_spectral_norms

Rung = Callable[[list[Tensor]], list[Tensor]]
Clock = Callable[[], float]

CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.thread_time}


@dataclass
class Result:
    """One rung of the ladder."""

    name: str
    milliseconds: float
    max_relative_error: float | None
    times_ours: float = 0.0


def resnet18_weights(width: int, device: str) -> list[Tensor]:
    """The 20 convolution weights of a CIFAR ResNet-18."""
    shapes = [(width, 3, 3, 3)] + [(width, width, 3, 3)] * 4
    for stage in (2, 4, 8):
        wide = width * stage
        shapes += [(wide, wide // 2, 3, 3), (wide, wide // 2, 1, 1)] + [(wide, wide, 3, 3)] * 3
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) * 0.05).to(device) for shape in shapes]


def author_loop(weights: list[Tensor]) -> list[Tensor]:
    """As published with Channel Lipschitzness Pruning: one singular value decomposition per filter."""
    norms = []
    for weight in weights:
        norms.append(torch.stack([torch.svd(kernel.reshape(kernel.shape[0], -1))[1].max() for kernel in weight]))
    return norms


def batched_svdvals(weights: list[Tensor]) -> list[Tensor]:
    """One batched call per layer."""
    return [torch.linalg.svdvals(weight.flatten(2)).amax(-1) for weight in weights]


def gram_eigvalsh(weights: list[Tensor]) -> list[Tensor]:
    """The Gram matrix on the kernel's side and its eigenvalues; 1x1 convolutions by their norm."""
    norms = []
    for weight in weights:
        matrices = weight.flatten(2)
        if matrices.shape[-1] == 1:
            norms.append(matrices.flatten(1).norm(dim=1))
        else:
            norms.append(torch.linalg.eigvalsh(matrices.mT @ matrices)[:, -1].clamp(min=0).sqrt())
    return norms


def read_floor(weights: list[Tensor]) -> list[Tensor]:
    """Reads every weight once."""
    return [weight.sum() for weight in weights]


LADDER: dict[str, Rung] = {
    "author's loop of svd": author_loop,
    "batched svdvals": batched_svdvals,
    "Gram + eigvalsh": gram_eigvalsh,
    "bdprune": filter_spectral_norms,
    "floor: read once": read_floor,
}


def seconds(rung: Rung, weights: list[Tensor], clock: Clock) -> float:
    """Time of one call, with the device's work finished."""
    if weights[0].is_cuda:
        torch.cuda.synchronize()
    start = clock()
    rung(weights)
    if weights[0].is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def relative_error(rung: Rung, weights: list[Tensor]) -> float | None:
    """Largest relative error against float64; None for the floor, which computes no norms."""
    if rung is read_floor:
        return None
    exact = batched_svdvals([weight.double() for weight in weights])
    pairs = zip(rung(weights), exact, strict=True)
    return max(((ours.double() - truth).abs() / truth).max().item() for ours, truth in pairs)


def measure(weights: list[Tensor], repeats: int, clock: Clock) -> list[Result]:
    """The ladder, each rung by its best round; the author's loop, which takes seconds, in the first rounds only."""
    best = dict.fromkeys(LADDER, float("inf"))
    filter_spectral_norms(weights)  # touches everything once
    for turn in range(repeats):
        for name, rung in LADDER.items():
            if rung is not author_loop or turn < 2:
                best[name] = min(best[name], seconds(rung, weights, clock))
    results = [Result(name, 1e3 * best[name], relative_error(rung, weights)) for name, rung in LADDER.items()]
    for result in results:
        result.times_ours = result.milliseconds / (1e3 * best["bdprune"])
    return results


def environment(arguments: argparse.Namespace, weights: list[Tensor]) -> dict[str, object]:
    """What a reader needs to compare figures."""
    device = torch.cuda.get_device_name() if weights[0].is_cuda else platform.processor() or platform.machine()
    return {
        "device": device,
        "width": arguments.width,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "clock": arguments.clock,
        "filters": sum(len(weight) for weight in weights),
        "megabytes": sum(weight.nbytes for weight in weights) / 1e6,
        "build": _backend.build_info(),
    }


def main() -> None:
    """Measures, prints the table, and writes JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and (arguments.threads != 1 or arguments.device != "cpu"):
        parser.error("--clock cpu measures the calling thread: it needs --threads 1 and --device cpu")
    torch.set_num_threads(arguments.threads)
    weights = resnet18_weights(arguments.width, arguments.device)
    results = measure(weights, arguments.repeats, CLOCKS[arguments.clock])
    info = environment(arguments, weights)
    print(
        f"{info['filters']} filters, {info['megabytes']:.1f} MB, {arguments.threads} thread(s), {arguments.clock} clock"
    )
    print(f"{'':24}{'ms':>10}{'x ours':>10}{'max rel. error':>18}")
    for result in results:
        error = "" if result.max_relative_error is None else f"{result.max_relative_error:.1e}"
        print(f"{result.name:24}{result.milliseconds:10.2f}{result.times_ours:10.2f}{error:>18}")
    if arguments.json:
        record = {"environment": info, "results": [asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
