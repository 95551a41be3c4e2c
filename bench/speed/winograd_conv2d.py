"""A 3x3 convolution in training: forward pass and gradients of input and weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from bdprune.ops import winograd_conv2d
from bench.speed.benchmark import Benchmark, Variant, Work, compiled, relative_error
from bench.speed.plan import Plan

Conv = Callable[[Tensor, Tensor], Tensor]

FEWER = 4
"""Products of a direct convolution per product of Winograd's F(4x4, 3x3): 144 / 36."""


@dataclass(frozen=True)
class Problem:
    """Input ``[N, C, H, W]``, weight ``[C, C, 3, 3]`` and the gradient of the output."""

    x: Tensor
    weight: Tensor
    grad: Tensor

    def to(self, dtype: torch.dtype, kind: torch.memory_format) -> Problem:
        """The same values in another dtype and memory format."""
        return Problem(*(one.detach().to(dtype, memory_format=kind) for one in (self.x, self.weight, self.grad)))


def benchmarks(plan: Plan) -> list[Benchmark]:
    """The four sizes of ResNet-18's 3x3 convolutions, at half and at full width."""
    widths = (plan.width,) if plan.quick else (plan.width // 2, plan.width)
    shapes = [(width << stage, 32 >> stage) for width in widths for stage in range(4)]
    return [conv_benchmark(plan, channels, size) for channels, size in shapes]


def conv_benchmark(plan: Plan, channels: int, size: int) -> Benchmark:
    """One layer. The lower bound counts Winograd's products, or the reads and writes of three convolutions."""
    data = problem(plan.conv_images, channels, size, plan.device)
    last = data.to(torch.float32, torch.channels_last)
    variants = (
        Variant("conv2d, NCHW", "author", partial(both_ways, direct, data)),
        Variant("conv2d, channels_last", "eager", partial(both_ways, direct, last)),
        Variant("unfold and a matrix product", "eager", partial(both_ways, unfolded, data)),
        *compiled(plan.device, "conv2d, channels_last", direct, lambda fast: both_ways(fast, last)),
        Variant("bdprune.ops.winograd_conv2d", "ours", partial(both_ways, winograd_conv2d, last)),
    )
    exact = cache(lambda: both_ways(direct, data.to(torch.float64, torch.contiguous_format)))
    flops = 3 * 2.0 * data.weight.numel() * data.x.shape[0] * size * size / FEWER
    return Benchmark(
        "3x3 convolution",
        f"[{plan.conv_images}, {channels}, {size}, {size}], forward and both gradients",
        variants,
        (Work(6 * data.x.nbytes + 4 * data.weight.nbytes, flops),),
        lambda found: relative_error(found, exact()),
        "largest error of output and gradients, relative to the largest value",
        seconds=plan.seconds,
    )


def problem(count: int, channels: int, size: int, device: torch.device) -> Problem:
    """Random values from a fixed seed; the input is the output of a ReLU."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(count, channels, size, size, generator=generator) for _ in range(2))
    weight = torch.randn(channels, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
    return Problem(x.relu().to(device), weight.to(device), grad.to(device))


def both_ways(conv: Conv, data: Problem) -> list[Tensor]:
    """Output and both gradients."""
    x, weight = data.x.detach().requires_grad_(), data.weight.detach().requires_grad_()
    out = conv(x, weight)
    return [out.detach(), *torch.autograd.grad(out, (x, weight), data.grad)]


def direct(x: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's convolution."""
    return functional.conv2d(x, weight, padding=1)


def unfolded(x: Tensor, weight: Tensor) -> Tensor:
    """A matrix product over patches as columns."""
    columns = functional.unfold(x, 3, padding=1)  # [N, 9 * C, H * W]
    return (weight.flatten(1) @ columns).view(x.shape[0], len(weight), *x.shape[2:])
