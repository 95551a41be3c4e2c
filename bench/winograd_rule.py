"""Compares the rule that chooses between Winograd's and direct convolutions with the faster of both.

    python -m bench.winograd_rule [--batches 16 128] [--rounds 5] [--threads 1] [--json results.json]

The rule, ``bdprune.ops.winograd_is_faster``, depends on the shape only, so that repeated runs give the same bits. This
script times both algorithms on a grid of shapes: 3x3 convolutions from C to C channels, and from the 3 channels of an
image, on square maps in channels_last and float32, forward only and with both gradients. It prints how many times
faster Winograd's is (processor time with one thread), and the cost of the rule: its time divided by the time of the
faster algorithm. To measure a CPU with AVX2 on one with AVX-512, set BDPRUNE_ISA=avx2 ATEN_CPU_CAPABILITY=avx2
ONEDNN_MAX_CPU_ISA=AVX2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean

import torch

from bdprune.ops import winograd_conv2d, winograd_is_faster
from bdprune.ops.tuner import ROUNDS, least_seconds
from bench.speed.machine import describe
from bench.speed.winograd_conv2d import Conv, Problem, both_ways, direct

CHANNELS = (8, 16, 32, 64, 128, 256, 512)
SIZES = (2, 4, 5, 6, 7, 8, 14, 16, 28, 32)
MOST_VALUES = 1 << 21  # of a map: larger shapes take too long and show nothing new
WRONG = 1.1  # cost of a wrong choice; below, the difference may be noise


@dataclass(frozen=True)
class Outcome:
    """Least seconds of both algorithms on one shape.

    Attributes:
        shape: of the input, ``[N, C, H, W]``.
        outputs: channels of the output.
        gradients: whether both gradients are included.
        rule: whether the rule chooses Winograd's.
    """

    shape: tuple[int, int, int, int]
    outputs: int
    gradients: bool
    direct: float
    winograd: float
    rule: bool

    @property
    def speedup(self) -> float:
        """How many times faster Winograd's is."""
        return self.direct / self.winograd

    @property
    def cost(self) -> float:
        """Time by the rule divided by the time of the faster algorithm; 1 if the rule is right."""
        return (self.winograd if self.rule else self.direct) / min(self.winograd, self.direct)


def shapes(
    batches: Sequence[int], channels: Sequence[int], sizes: Sequence[int]
) -> Iterator[tuple[int, int, int, int]]:
    """Samples, input channels, output channels and pixels per side."""
    for samples in batches:
        for inputs, outputs in [(3, channels[-1]), *((count, count) for count in channels)]:
            for size in sizes:
                if samples * max(inputs, outputs) * size * size <= MOST_VALUES:
                    yield samples, inputs, outputs, size


def outcomes(samples: int, inputs: int, outputs: int, size: int, rounds: int) -> list[Outcome]:
    """Both algorithms on one shape, without and with gradients."""
    data = _problem(samples, inputs, outputs, size)
    rule = winograd_is_faster(data.x, data.weight)
    found = []
    for gradients in (False, True):
        run = both_ways if gradients else _forward
        runs = [partial(run, conv, data) for conv in (direct, winograd_conv2d)]
        direct_seconds, winograd_seconds = least_seconds(data.x.device, rounds, *runs)
        found.append(Outcome((samples, inputs, size, size), outputs, gradients, direct_seconds, winograd_seconds, rule))
    return found


def _problem(samples: int, inputs: int, outputs: int, size: int) -> Problem:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(samples, count, size, size, generator=generator) for count in (inputs, outputs)]
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator)
    return Problem(maps[0], weight, maps[1]).to(torch.float32, torch.channels_last)


@torch.no_grad()
def _forward(conv: Conv, data: Problem) -> None:
    conv(data.x, data.weight)


def summary(found: Sequence[Outcome]) -> str:
    """The cost of the rule as text."""
    wrong = [one for one in found if one.cost > WRONG]
    worst = max(found, key=lambda one: one.cost)
    by_rule, direct, winograd = costs(found)
    return (
        f"{len(found)} timings. Time by the rule divided by the time of the faster algorithm: geometric mean "
        f"{by_rule:.3f}, above {WRONG} in {len(wrong)}, at worst {worst.cost:.2f} ({list(worst.shape)} to "
        f"{worst.outputs} channels). Always direct: {direct:.3f}; always Winograd's: {winograd:.3f}."
    )


def costs(found: Sequence[Outcome]) -> tuple[float, float, float]:
    """Time divided by the time of the faster algorithm, as a geometric mean: by the rule, always direct, Winograd's."""
    least = [min(one.direct, one.winograd) for one in found]
    chosen = [[one.cost * best for one, best in zip(found, least, strict=True)]]
    chosen += [[one.direct for one in found], [one.winograd for one in found]]
    by_rule, direct, winograd = (
        geometric_mean(time / best for time, best in zip(times, least, strict=True)) for times in chosen
    )
    return by_rule, direct, winograd


def main() -> None:
    """Prints the table row by row; ``--json`` also writes it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        "| input | outputs | gradients | Winograd's is faster by | the rule chooses | cost |\n|---|---|---|---|---|---|"
    )
    found: list[Outcome] = []
    for shape in shapes(args.batches, args.channels, args.sizes):
        for one in outcomes(*shape, args.rounds):
            found.append(one)
            cells = (list(one.shape), one.outputs, "yes" if one.gradients else "no", f"{one.speedup:.2f}")
            print(
                "|",
                " | ".join(map(str, cells)),
                "|",
                "Winograd" if one.rule else "direct",
                f"| {one.cost:.2f} |",
                flush=True,
            )
    if not found:
        sys.exit(f"Every shape has more than {MOST_VALUES} values; give smaller --batches, --channels or --sizes.")
    print("\n" + summary(found))
    if args.json:
        record = {
            "machine": describe(torch.device("cpu")),
            "threads": args.threads,
            "outcomes": [asdict(one) for one in found],
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
