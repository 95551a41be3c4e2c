"""Spectral norms of all filters of a network in one call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from bdprune.model.architectures.vgg import _STAGES, _WIDTHS
from bdprune.ops import filter_spectral_norms
from bench.speed.benchmark import Benchmark, Variant, Work, compiled, max_or_nan
from bench.speed.plan import Plan

Weights = list[Tensor]


def benchmarks(plan: Plan) -> list[Benchmark]:
    """ResNet-18 and VGG-19-BN."""
    shapes = {"ResNet-18": resnet18_shapes(plan.width), "VGG-19-BN": vgg19_shapes(plan.width)}
    return [spectral_benchmark(plan, name, random_weights(sizes, plan.device)) for name, sizes in shapes.items()]


def spectral_benchmark(plan: Plan, network: str, weights: Weights) -> Benchmark:
    """One network. The lower bound reads every weight once."""

    @cache
    def truth() -> Weights:
        return batched_svdvals([weight.double() for weight in weights])

    def error(found: Weights) -> float:
        pairs = zip(found, truth(), strict=True)
        return max_or_nan([((ours.double() - exact).abs() / exact).max().item() for ours, exact in pairs])

    eager = {
        "batched svdvals": batched_svdvals,
        "matrix_norm(ord=2)": matrix_norms,
        "float32 Gram + eigvalsh": gram_eigvalsh,
        "float64 Gram + eigvalsh": gram_eigvalsh_wide,
    }
    if plan.device.type == "cuda":
        eager |= {"svdvals, gesvda driver": svdvals_gesvda, "Gram on the GPU, eigvalsh on the CPU": gram_on_device}
    variants = (
        Variant("one svd per filter", "author", lambda: author_loop(weights)),
        *(Variant(name, "eager", lambda call=call: call(weights)) for name, call in eager.items()),  # type: ignore[misc]
        *compiled(plan.device, "float32 Gram + eigvalsh", gram_eigvalsh, lambda fast: fast(weights)),
        Variant("bdprune.ops.filter_spectral_norms", "ours", lambda: filter_spectral_norms(weights)),
        Variant("sum of every weight", "required", lambda: read_once(weights), exact=False),
    )
    filters, size = sum(map(len, weights)), sum(weight.nbytes for weight in weights)
    case = f"{network} width {plan.width}: {filters} filters, {size / 1e6:.1f} MB"
    name = "largest relative error of a norm"
    return Benchmark("Spectral norms", case, variants, (Work(size),), error, name, seconds=plan.seconds)


def resnet18_shapes(width: int) -> list[tuple[int, ...]]:
    """Weight shapes of the 20 convolutions in a CIFAR ResNet-18."""
    shapes = [(width, 3, 3, 3)] + [(width, width, 3, 3)] * 4
    for stage in (2, 4, 8):
        wide = width * stage
        shapes += [(wide, wide // 2, 3, 3), (wide, wide // 2, 1, 1)] + [(wide, wide, 3, 3)] * 3
    return shapes


def vgg19_shapes(width: int) -> list[tuple[int, ...]]:
    """Weight shapes of the 16 convolutions in a VGG-19."""
    shapes, channels = [], 3
    for depth, factor in zip(_STAGES[19], _WIDTHS, strict=True):
        for _ in range(depth):
            shapes.append((width * factor, channels, 3, 3))
            channels = width * factor
    return shapes


def random_weights(shapes: Sequence[tuple[int, ...]], device: torch.device) -> Weights:
    """Normally distributed float32 weights from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) * 0.05).to(device) for shape in shapes]


def author_loop(weights: Weights) -> Weights:
    """The published loop of Channel Lipschitzness Pruning: one singular value decomposition per filter, on the CPU."""
    return [
        torch.stack([torch.svd(kernel.cpu().flatten(1))[1].max() for kernel in weight]).to(weight.device)
        for weight in weights
    ]


def batched_svdvals(weights: Weights) -> Weights:
    """One batched call per layer."""
    return [torch.linalg.svdvals(weight.flatten(2)).amax(-1) for weight in weights]


def matrix_norms(weights: Weights) -> Weights:
    """``torch.linalg.matrix_norm`` with ``ord=2``."""
    return [torch.linalg.matrix_norm(weight.flatten(2), ord=2) for weight in weights]


def svdvals_gesvda(weights: Weights) -> Weights:
    """CUDA only: the only driver that accepts batches of tall matrices."""
    return [torch.linalg.svdvals(weight.flatten(2), driver="gesvda").amax(-1) for weight in weights]


def gram_eigvalsh(weights: Weights) -> Weights:
    """Eigenvalues of the Gram matrix on the kernel side; 1x1 convolutions use the vector norm."""
    return [_by_gram(weight.flatten(2)) for weight in weights]


def gram_eigvalsh_wide(weights: Weights) -> Weights:
    """The same in float64, which is accurate for filters of any scale."""
    return [_by_gram(weight.flatten(2).double()).float() for weight in weights]


def gram_on_device(weights: Weights) -> Weights:
    """Products on the GPU, eigenvalues on the CPU: CUDA's batched eigensolver is slow in some releases."""
    return [_by_gram(weight.flatten(2), torch.device("cpu")).to(weight.device) for weight in weights]


def _by_gram(matrices: Tensor, solve_on: torch.device | None = None) -> Tensor:
    if matrices.shape[-1] == 1:
        return matrices.flatten(1).norm(dim=1)
    gram = matrices.mT @ matrices
    return torch.linalg.eigvalsh(gram.to(solve_on or gram.device))[:, -1].clamp(min=0).sqrt()


def read_once(weights: Weights) -> Weights:
    """Reads every weight once."""
    return [weight.sum() for weight in weights]
