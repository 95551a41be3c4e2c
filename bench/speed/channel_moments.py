"""Mean, correlation and activation norm of the channels of every layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from bdprune.ops import ChannelMoments
from bench.speed.benchmark import Benchmark, Variant, Work, absolute_error, compiled
from bench.speed.plan import Plan

Moments = tuple[Tensor, Tensor, Tensor]
"""Mean ``[C]``, correlation ``[C, C]`` and activation norm ``[C]`` of one map ``[N, C, H, W]``."""


def benchmarks(plan: Plan) -> list[Benchmark]:
    """All layers of ResNet-18, and one layer whose mean is far from zero."""
    shapes = resnet18_maps(plan.width)
    generator = torch.Generator().manual_seed(0)
    maps = [_maps(plan, shape, generator).relu() for shape in shapes]
    far = [_maps(plan, shapes[5], generator) + 30]
    every = f"{len(maps)} layers of ResNet-18 width {plan.width}, {plan.images} images, after ReLU"
    one = f"one layer [{plan.images}, {', '.join(map(str, shapes[5]))}], mean = 30 standard deviations"
    return [moments_benchmark(plan, every, maps), moments_benchmark(plan, one, far)]


def moments_benchmark(plan: Plan, case: str, maps: list[Tensor]) -> Benchmark:
    """One set of maps, NCHW. The lower bound reads them once or computes half of a symmetric product."""

    @cache
    def truth() -> list[Tensor]:
        return [by_rows(one.double())[1] for one in maps]

    def error(found: list[Moments]) -> float:
        return absolute_error([correlation for _, correlation, _ in found], truth())

    eager: dict[str, Callable[[Tensor], Moments]] = {
        "corrcoef of a transposed copy": by_corrcoef,
        "batched product per image, summed": by_bmm,
        "transposed copy, one product": by_rows,
        "addmm per image": by_addmm,
        "channels-last copy, one product": by_columns,
    }
    variants = (
        Variant("one channel against all, in turn", "author", lambda: [by_channel(one) for one in maps], note=_NO_CODE),
        *(Variant(name, "eager", partial(_over, call, maps)) for name, call in eager.items()),
        *compiled(plan.device, "transposed copy, one product", _all_by_rows, lambda fast: fast(maps)),
        Variant("bdprune.ops.ChannelMoments", "ours", partial(_over, ours, maps)),
    )
    work = tuple(Work(one.nbytes, one.numel() * (one.shape[1] + 1)) for one in maps)
    name = "largest absolute error of a correlation"
    # A call over all layers is long and the variants differ little, so each needs several calls.
    seconds = plan.seconds * (3 if len(maps) > 1 else 1)
    return Benchmark("Channel moments", case, variants, work, error, name, seconds=seconds)


_NO_CODE = "no public code exists; the formula, channel by channel"


def resnet18_maps(width: int) -> list[tuple[int, int, int]]:
    """(channels, height, width) of the outputs of the 20 convolutions in a CIFAR ResNet-18."""
    maps = [(width, 32, 32)] * 5
    for stage, size in ((2, 16), (4, 8), (8, 4)):
        maps += [(width * stage, size, size)] * 5
    return maps


def _maps(plan: Plan, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(plan.images, *shape, generator=generator).to(plan.device)


def _over(call: Callable[[Tensor], Moments], maps: list[Tensor]) -> list[Moments]:
    return [call(one) for one in maps]


def _all_by_rows(maps: list[Tensor]) -> list[Moments]:
    return _over(by_rows, maps)


def ours(x: Tensor) -> Moments:
    """The streaming op."""
    moments = ChannelMoments(x.shape[1], x.device)
    moments.update(x)
    return moments.mean, moments.correlation(), moments.activation_norm


def by_channel(x: Tensor) -> Moments:
    """Covariance of each channel with all others, one channel at a time."""
    mean, centred = _centred(x)
    covariance = torch.stack([centred @ channel for channel in centred]) / centred.shape[1]
    return mean, _correlation(covariance), _activation(x)


def by_corrcoef(x: Tensor) -> Moments:
    """``torch.corrcoef``."""
    rows = x.transpose(0, 1).flatten(1)
    return rows.mean(1), torch.corrcoef(rows), _activation(x)


def by_rows(x: Tensor) -> Moments:
    """Centred rows, one matrix product."""
    mean, centred = _centred(x)
    return mean, _correlation(centred @ centred.T / centred.shape[1]), _activation(x)


def by_bmm(x: Tensor) -> Moments:
    """No copy: one product per image into ``[N, C, C]``; the mean is subtracted at the end."""
    slabs = x.flatten(2)
    count = slabs.shape[0] * slabs.shape[2]
    mean = slabs.mean((0, 2))
    second = torch.bmm(slabs, slabs.mT).sum(0) / count
    return mean, _correlation(second - torch.outer(mean, mean)), _activation(x)


def by_addmm(x: Tensor) -> Moments:
    """No copy and no intermediate: adds the products up image by image."""
    slabs = x.flatten(2)
    count = slabs.shape[0] * slabs.shape[2]
    second = x.new_zeros(x.shape[1], x.shape[1])
    for slab in slabs:
        second.addmm_(slab, slab.T)
    mean = slabs.mean((0, 2))
    return mean, _correlation(second / count - torch.outer(mean, mean)), _activation(x)


def by_columns(x: Tensor) -> Moments:
    """Rows are positions: the fastest layout for a product, after a copy."""
    positions = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    mean = positions.mean(0)
    centred = positions - mean
    return mean, _correlation(centred.T @ centred / len(centred)), _activation(x)


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.transpose(0, 1).flatten(1)
    mean = rows.mean(1)
    return mean, rows - mean[:, None]


def _correlation(covariance: Tensor) -> Tensor:
    deviation = covariance.diagonal().clamp(min=0).sqrt()
    return (covariance / torch.outer(deviation, deviation)).clamp(-1, 1)


def _activation(x: Tensor) -> Tensor:
    slabs = x.flatten(2)
    return torch.linalg.vector_norm(slabs, dim=2).mean(0) / slabs.shape[2] ** 0.5
