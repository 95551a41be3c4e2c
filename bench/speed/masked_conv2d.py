"""A convolution with a mask on its filters: forward pass, and gradients of the input and of the mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.model import MaskedNetwork, Model
from bdprune.ops import masked_conv2d
from bdprune.runtime import WinogradConvs
from bench.speed.benchmark import Benchmark, Variant, Work, compiled, relative_error
from bench.speed.plan import Plan
from bench.speed.winograd_conv2d import FEWER

Result = tuple[Tensor, Tensor, Tensor]
"""Output, gradient of the input, gradient of the mask."""


@dataclass(frozen=True)
class Problem:
    """Input ``[N, C, H, W]``, frozen weight ``[C, C, 3, 3]``, mask ``[C]`` and the gradient of the output."""

    x: Tensor
    weight: Tensor
    mask: Tensor
    grad: Tensor


def benchmarks(plan: Plan) -> list[Benchmark]:
    """A wide and a deep layer of ResNet-18 in both memory formats, and one layer with a batch norm."""
    wide, deep = (plan.width, 32), (4 * plan.width, 8)
    formats = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
    found = [conv_benchmark(plan, *shape, name, kind) for shape in (wide, deep) for name, kind in formats.items()]
    return [*found, norm_benchmark(plan, *deep)]


def problem(count: int, channels: int, size: int, device: torch.device, kind: torch.memory_format) -> Problem:
    """Random values from a fixed seed, in the given memory format."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(count, channels, size, size, generator=generator) for _ in range(2))
    weight = torch.randn(channels, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
    mask = torch.rand(channels, generator=generator)
    x, grad, weight = (tensor.to(device).to(memory_format=kind) for tensor in (x, grad, weight))
    return Problem(x.requires_grad_(), weight, mask.to(device).requires_grad_(), grad)


def conv_benchmark(plan: Plan, channels: int, size: int, name: str, kind: torch.memory_format) -> Benchmark:
    """One layer. The lower bound is two convolutions (by Winograd's products on a CPU) or their reads and writes."""
    data = problem(plan.conv_images, channels, size, plan.device, kind)
    plain_calls: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "mask times output": on_output,
        "mask as a depthwise convolution": as_depthwise,
        "hand-written backward": HandWritten.apply,
    }
    variants = (
        Variant("mask times weights, by autograd", "author", partial(both_ways, on_weights, data)),
        *(Variant(name, "eager", partial(both_ways, call, data)) for name, call in plain_calls.items()),
        *compiled(plan.device, "mask times output", on_output, lambda fast: both_ways(fast, data)),
        *_ours("bdprune.ops.masked_conv2d", plan.device, partial(both_ways, ours, data), partial(unmasked, data)),
    )
    case = f"[{plan.conv_images}, {channels}, {size}, {size}], 3x3, {name}"
    what = "largest error of output and gradients, relative to the largest value"
    return Benchmark(
        "Masked convolution", case, variants, (_work(data),), _error(data, on_output), what, seconds=plan.seconds
    )


def norm_benchmark(plan: Plan, channels: int, size: int) -> Benchmark:
    """A convolution and a batch norm in train mode: the mask can be part of the norm's scale."""
    data = problem(plan.conv_images, channels, size, plan.device, torch.channels_last)
    pair = _pair(data)
    masked = MaskedNetwork(Model(pair.eval(), "pair", channels, (channels, size, size))).train()
    pair.train().requires_grad_(False)

    def in_network() -> Result:
        (mask,) = masked.masks.values()
        with torch.no_grad():
            mask.copy_(data.mask)
        y = masked(data.x)
        return y, *torch.autograd.grad(y, (data.x, mask), data.grad)

    def after_norm() -> Result:
        y = pair(data.x) * data.mask[:, None, None]
        return y, *torch.autograd.grad(y, (data.x, data.mask), data.grad)

    def plain() -> Tensor:
        return torch.autograd.grad(pair(data.x), data.x, data.grad)[0]

    variants = (
        Variant("mask times weights, by autograd", "author", partial(both_ways, weights_and_norm, data), exact=False),
        Variant("mask times output of the norm", "eager", after_norm),
        Variant("mask times scale of the norm", "eager", partial(both_ways, scale_of_norm, data)),
        *compiled(plan.device, "mask times scale of the norm", scale_of_norm, lambda fast: both_ways(fast, data)),
        *_ours("bdprune.model.edit.mask.MaskedNetwork", plan.device, in_network, plain),
    )
    case = f"[{plan.conv_images}, {channels}, {size}, {size}], 3x3 and batch norm in train mode, channels_last"
    what = "largest error of output and gradients, relative to the largest value"
    return Benchmark(
        "Masked convolution", case, variants, (_work(data),), _error(data, scale_of_norm), what, seconds=plan.seconds
    )


def _ours(
    name: str, device: torch.device, run: Callable[[], Result], bound: Callable[[], Tensor]
) -> tuple[Variant, ...]:
    """Ours, and PyTorch's convolution without a mask. On a CPU, first with Winograd's algorithm, then direct."""
    unmasked = "no mask, gradient of the input"
    if device.type != "cpu":
        return Variant(name, "ours", run), Variant(unmasked, "required", bound, exact=False)
    return (
        Variant(f"{name}, Winograd", "ours", partial(by_winograd, run)),
        Variant(f"{name}, direct", "ours", run),
        Variant(f"{unmasked}, Winograd", "ours", partial(by_winograd, bound), exact=False),
        Variant(unmasked, "required", bound, note="by PyTorch's convolutions", exact=False),
    )


def by_winograd(run: Callable[[], Result | Tensor]) -> Result | Tensor:
    """As unlearning and recovery run on a CPU by default."""
    with WinogradConvs():
        return run()


def both_ways(call: Callable[[Tensor, Tensor, Tensor], Tensor], data: Problem) -> Result:
    """Forward pass and both gradients."""
    y = call(data.x, data.weight, data.mask)
    return y, *torch.autograd.grad(y, (data.x, data.mask), data.grad)


def on_weights(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """As in Adversarial Weight Masking: the mask's gradient needs the weight's."""
    return functional.conv2d(x, weight * mask[:, None, None, None], padding=1)


def on_output(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """The same function; its backward pass has one convolution less."""
    return functional.conv2d(x, weight, padding=1) * mask[:, None, None]


def as_depthwise(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """The mask as 1x1 filters with one channel each."""
    return functional.conv2d(functional.conv2d(x, weight, padding=1), mask[:, None, None, None], groups=len(mask))


def weights_and_norm(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """For time only: a norm in train mode cancels a mask on the weights, so this is a different function."""
    return functional.batch_norm(on_weights(x, weight, mask), None, None, training=True)


def scale_of_norm(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """As in Adversarial Neuron Pruning: the mask adds no work."""
    return functional.batch_norm(functional.conv2d(x, weight, padding=1), None, None, mask, training=True)


def ours(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """The op."""
    return masked_conv2d(x, weight, mask, padding=1)


def unmasked(data: Problem) -> Tensor:
    """The work of a masked convolution without its mask."""
    return torch.autograd.grad(functional.conv2d(data.x, data.weight, padding=1), data.x, data.grad)[0]


class HandWritten(torch.autograd.Function):
    """Expert Python: only the two convolutions and the two sums that the task needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        z = functional.conv2d(x, weight, padding=1)
        ctx.save_for_backward(x, weight, mask, z)
        return z * mask[:, None, None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        x, weight, mask, z = ctx.saved_tensors
        scaled = grad * mask[:, None, None]
        grad_x = torch.ops.aten.convolution_backward(
            scaled, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
        )[0]
        return grad_x, None, (grad * z).sum((0, 2, 3))


def _pair(data: Problem) -> nn.Sequential:
    conv = nn.Conv2d(data.weight.shape[1], len(data.weight), 3, padding=1, bias=False)
    pair = nn.Sequential(conv, nn.BatchNorm2d(len(data.weight))).to(data.x.device)
    with torch.no_grad():
        conv.weight.copy_(data.weight)
    return pair.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _work(data: Problem) -> Work:
    """Forward: read input, write output. Backward: read gradient, write gradient. Two convolutions."""
    flops = 2 * 2.0 * data.weight.numel() * data.x.shape[0] * data.x.shape[2] * data.x.shape[3]
    flops /= FEWER if data.x.device.type == "cpu" else 1
    return Work(4 * data.x.nbytes + 2 * data.weight.nbytes, flops)


def _double(data: Problem) -> Problem:
    x, weight, mask, grad = (one.detach().double() for one in (data.x, data.weight, data.mask, data.grad))
    return Problem(x.requires_grad_(), weight, mask.requires_grad_(), grad)


def _error(data: Problem, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Result], float]:
    """The error compared with ``call`` in float64, which runs on first use."""
    wide = _double(data)
    exact = cache(lambda: both_ways(call, wide))
    return lambda found: relative_error([one.detach() for one in found], [one.detach() for one in exact()])
