"""filter_spectral_norms compared with float64 singular values, on ordinary and on difficult filters."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bdprune.ops import _backend, filter_spectral_norms, reference

from .helpers import DTYPES, assert_error_ratio, random, rounding, threads

native = pytest.mark.skipif(not _backend.HAS_OPS, reason="the compiled ops are not built or switched off")

SHAPES = [
    (7, 5, 3, 3),
    (16, 64, 3, 3),
    (9, 3, 3, 3),  # C_in of 3: the Gram matrix is 3 x 3
    (5, 1, 3, 3),  # depthwise: a vector
    (33, 16, 1, 1),
    (3, 20, 5, 5),
    (4, 3, 7, 7),
    (2, 64, 7, 7),
    (3, 8, 3, 3),
    (3, 9, 3, 3),
    (10, 2, 2, 2),
    (3, 12, 1, 7),
    (2, 60, 8, 8),  # both sides above 49
    (2, 80, 8, 8),
    (2, 3, 6, 4, 4),
    (2, 3, 1, 5, 5),
    (6, 50),
    (1, 1),
]


def exact_norms(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Computed on the CPU, because float64 singular values from a GPU have their own error."""
    return reference.spectral_norms(weight.cpu(), None if scale is None else scale.cpu()).to(weight.device)


def plain_norms(weight: Tensor) -> Tensor:
    """svdvals in the dtype of the weight, or in float32 if svdvals does not support it."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.linalg.svdvals(reference.filter_matrices(weight).to(dtype)).amax(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_is_at_most_twice_the_error_of_svdvals(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    weight = random(shape, dtype, device)
    (ours,) = filter_spectral_norms([weight])
    assert ours.shape == (shape[:2] if len(shape) == 5 else shape[:1])
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = exact_norms(weight)
    # On CUDA, Jacobi's rotations of a 64 x 64 matrix round more often than the CPU's method for the largest eigenvalue.
    terms = 16 if device == "cpu" else 48
    assert_error_ratio(ours.flatten(), plain_norms(weight), exact, rounding(exact, ours.dtype, terms))


def test_hand_computed(device: str) -> None:
    weight = torch.zeros(3, 2, 2, 2, device=device)
    weight[0, 0, 0, 0] = -3.0  # one entry: its magnitude
    weight[1, 0], weight[1, 1] = 1.0, 1.0  # rank 1, 2 x 4 ones: sqrt(8)
    weight[2, 0, 0, 0], weight[2, 1, 0, 1] = 4.0, 5.0  # orthogonal rows: the longer one
    (ours,) = filter_spectral_norms([weight])
    assert torch.allclose(ours.cpu(), torch.tensor([3.0, 8.0**0.5, 5.0]), rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
def test_scales_multiply_by_their_magnitude(scale_dtype: torch.dtype, device: str) -> None:
    weights = [random((5, 4, 3, 3), torch.float32, device), random((2, 3, 4, 3, 3), torch.float32, device, seed=1)]
    scales = [random((5,), scale_dtype, device, seed=2), random((2, 3), scale_dtype, device, seed=3)]
    for ours, weight, scale in zip(filter_spectral_norms(weights, scales), weights, scales, strict=True):
        assert ours.shape == scale.shape
        expected = exact_norms(weight, scale).view(scale.shape)
        assert torch.allclose(ours.double(), expected, rtol=2e-7, atol=0.0)


def test_list_equals_single_calls_bit_for_bit(device: str) -> None:
    weights = [random(shape, torch.float32, device, seed=i) for i, shape in enumerate(SHAPES)]
    joint = filter_spectral_norms(weights)
    for weight, ours in zip(weights, joint, strict=True):
        assert torch.equal(ours, filter_spectral_norms([weight])[0])


def test_a_stack_equals_its_members_bit_for_bit(device: str) -> None:
    stack = random((3, 5, 7, 3, 3), torch.float32, device)
    (ours,) = filter_spectral_norms([stack])
    for member, norms in zip(stack, ours, strict=True):
        assert torch.equal(norms, filter_spectral_norms([member])[0])


def test_mixed_dtypes_keep_their_own_precision(device: str) -> None:
    wide, narrow = random((4, 5, 3, 3), torch.float64, device), random((3, 5, 3, 3), torch.float16, device, seed=1)
    norms = filter_spectral_norms([narrow, wide])
    assert [n.dtype for n in norms] == [torch.float32, torch.float64]
    assert torch.equal(norms[1], filter_spectral_norms([wide])[0])
    assert torch.equal(norms[0], filter_spectral_norms([narrow])[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "shape", [(9, 6, 3, 3), (9, 40, 3, 3), (9, 1, 3, 3), (9, 3, 7, 7), (9, 16, 5, 5), (3, 60, 8, 8)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_value_affects_only_its_filter(
    shape: tuple[int, ...], bad: float, dtype: torch.dtype, device: str
) -> None:
    weight = random(shape, dtype, device)
    (clean,) = filter_spectral_norms([weight])
    weight[1, 0, 1, 1] = bad
    (ours,) = filter_spectral_norms([weight])
    assert ours[1].isnan()
    others = torch.arange(shape[0]) != 1
    assert torch.equal(ours[others], clean[others])


@pytest.mark.parametrize("exponent", [-30, -22, 19, 30])
@pytest.mark.parametrize("shape", [(9, 6, 3, 3), (9, 40, 3, 3), (4, 1, 3, 3), (4, 16, 5, 5), (2, 60, 8, 8)], ids=str)
def test_extreme_ranges_of_float32(shape: tuple[int, ...], exponent: int, device: str) -> None:
    weight = (random(shape) * 10.0**exponent).float().to(device)
    exact = exact_norms(weight)
    (ours,) = filter_spectral_norms([weight])
    assert ((ours.double() - exact).abs() <= 1.2e-7 * exact).all()


@pytest.mark.parametrize("kind", ["constant", "equal rows", "equal columns"])
@pytest.mark.parametrize("channels", [3, 16, 512])
def test_rounding_in_one_direction_keeps_errors_small(kind: str, channels: int, device: str) -> None:
    """Sums of equal products in float32 drift; plain PyTorch's do too."""
    shape = {"constant": (1, 1), "equal rows": (1, 9), "equal columns": (channels, 1)}[kind]
    weight = random((200, *shape), torch.float32, device).expand(-1, channels, 9).reshape(200, channels, 3, 3)
    (ours,) = filter_spectral_norms([weight])
    exact = exact_norms(weight)
    assert_error_ratio(ours, plain_norms(weight), exact, rounding(exact, ours.dtype, terms=16))


@pytest.mark.parametrize("shape", [(7, 16, 3, 3), (7, 300, 3, 3), (7, 5, 5, 5), (7, 3, 3, 3)], ids=str)
def test_filters_of_every_range_in_one_batch(shape: tuple[int, ...], device: str) -> None:
    weight = random(shape)
    scales = [1e-44, 1e-38, 1e-25, 1.0, 1e12, 1e25, 1e37]
    weight = (weight * torch.tensor(scales, dtype=torch.float64).view(7, 1, 1, 1)).float().to(device)
    (ours,) = filter_spectral_norms([weight])
    exact = exact_norms(weight)
    # The smallest norms are denormals, whose spacing is 1.4e-45.
    assert ((ours.double() - exact).abs() <= 1.2e-7 * exact + 7.1e-46).all()
    for i in range(7):
        assert torch.equal(filter_spectral_norms([weight[i : i + 1]])[0], ours[i : i + 1])


@pytest.mark.parametrize("exponent", [-300, -200, 160, 300])
@pytest.mark.parametrize("shape", [(9, 6, 3, 3), (4, 1, 3, 3), (2, 60, 8, 8)], ids=str)
def test_extreme_ranges_of_float64(shape: tuple[int, ...], exponent: int, device: str) -> None:
    weight = random(shape, device=device) * 10.0**exponent
    unscaled = torch.linalg.svdvals(reference.filter_matrices(random(shape))).amax(-1)
    (ours,) = filter_spectral_norms([weight])
    assert torch.allclose(ours.cpu() / 10.0**exponent, unscaled, rtol=1e-14, atol=0.0)


def with_spectrum(values: Tensor, rows: int, seed: int) -> Tensor:
    """A [rows, len(values)] matrix with these singular values."""
    left = torch.linalg.qr(random((rows, len(values)), seed=seed)).Q
    right = torch.linalg.qr(random((len(values), len(values)), seed=seed + 1)).Q
    return left @ values.diag() @ right.T


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([1.0] + [0.0] * 8),
        torch.ones(9),
        torch.tensor([1.0, 1.0] + [0.5] * 7),
        torch.tensor([1.0, 1.0 - 1e-9] + [1e-3] * 7),
        torch.logspace(0, -12, 9),
        torch.tensor([1.0] + [1.0 - 1e-3 * i for i in range(1, 9)]),
        torch.tensor([1.0] + [1.0 - 1e-8 * i for i in range(1, 9)], dtype=torch.float64),
        torch.tensor([1.0, 1.0 - 1e-8, 1.0 - 2e-8, 1.0 - 1e-15] + [0.99] * 5, dtype=torch.float64),
        torch.tensor([1.0] * 5 + [0.0] * 4),
        torch.tensor([1.0] + [1.0 - 1e-13] * 8, dtype=torch.float64),
    ],
    ids=[
        "rank 1",
        "all equal",
        "double",
        "nearly double",
        "graded",
        "clustered",
        "within 1e-8",
        "cluster of four",
        "five times",
        "within 1e-13",
    ],
)
def test_hard_spectra(values: Tensor, device: str) -> None:
    weight = torch.stack([with_spectrum(values.double(), 40, seed) for seed in range(10)]).view(10, 40, 3, 3)
    (ours,) = filter_spectral_norms([weight.to(device)])
    assert torch.allclose(ours.cpu(), torch.full((10,), 1.0, dtype=torch.float64), rtol=4e-15, atol=0.0)


def test_zero_and_empty_filters_have_norm_zero(device: str) -> None:
    shapes = [(4, 3, 3, 3), (0, 3, 3, 3), (4, 0, 3, 3), (4, 3, 0, 3), (2, 0, 5, 3, 3), (3, 0)]
    norms = filter_spectral_norms([torch.zeros(shape, device=device) for shape in shapes])
    assert [tuple(n.shape) for n in norms] == [(4,), (0,), (4,), (4,), (2, 0), (3,)]
    assert all((n == 0).all() for n in norms)
    assert filter_spectral_norms([]) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_change_the_norms(dtype: torch.dtype, device: str) -> None:
    weight = random((6, 12, 3, 3), dtype, device)
    (expected,) = filter_spectral_norms([weight])
    channels_last = weight.contiguous(memory_format=torch.channels_last)
    strided = weight.new_zeros(12, 24, 3, 3)[::2, ::2].copy_(weight)
    permuted = weight.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    expanded = weight[:1].expand(4, -1, -1, -1)
    for other in (channels_last, strided, permuted):
        (ours,) = filter_spectral_norms([other])
        assert torch.allclose(ours, expected, rtol=3e-7 if dtype != torch.float64 else 1e-15, atol=0.0)
    assert torch.equal(filter_spectral_norms([expanded])[0], expected[:1].expand(4))


@pytest.mark.parametrize("shape", [(6, 70, 3, 3), (6, 3, 7, 7), (6, 30, 1, 1), (2, 3, 12, 5, 5)], ids=str)
def test_channels_last_filters(shape: tuple[int, ...], device: str) -> None:
    weight = random(shape, torch.float32, device)
    order = [*range(len(shape) - 3), len(shape) - 2, len(shape) - 1, len(shape) - 3]
    back = [*range(len(shape) - 3), len(shape) - 1, len(shape) - 3, len(shape) - 2]
    transposed = weight.permute(order).contiguous().permute(back)
    (ours,) = filter_spectral_norms([transposed])
    assert torch.allclose(ours, filter_spectral_norms([weight])[0], rtol=1.2e-7, atol=0.0)


def test_same_bits_with_one_and_two_threads(device: str) -> None:
    weights = [random((40, 64, 3, 3), torch.float32, device, seed=i) for i in range(6)]
    weights += [random((16, 64, 5, 5), torch.float32, device), random((64, 500), torch.float32, device)]
    with threads(1):
        one = filter_spectral_norms(weights)
    with threads(2):
        two = filter_spectral_norms(weights)
        again = filter_spectral_norms(weights)
    for a, b, c in zip(one, two, again, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_norms_have_no_gradient(device: str) -> None:
    weight = random((3, 4, 3, 3), torch.float32, device).requires_grad_()
    (ours,) = filter_spectral_norms([weight], [torch.ones(3, device=device, requires_grad=True)])
    assert not ours.requires_grad


@native
def test_opcheck(device: str) -> None:
    weights = [random((4, 3, 3, 3), torch.float32, device), random((2, 2, 3, 3, 3), torch.float32, device)]
    op = torch.ops.bdprune.filter_spectral_norms.default
    torch.library.opcheck(op, (weights, [None, random((2, 2), torch.float32, device)]))
    torch.library.opcheck(op, ([weights[0], weights[1].double()], [None, None]))


def test_compiles_without_a_graph_break(device: str) -> None:
    weights = [random((4, 3, 3, 3), torch.float32, device), random((5, 4, 1, 1), torch.float32, device)]

    def total(first: Tensor, second: Tensor) -> Tensor:
        return sum(norms.sum() for norms in filter_spectral_norms([first, second], [None, second[:, 0, 0, 0]]))

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*weights), total(*weights), rtol=1e-6)


@pytest.mark.parametrize(
    ("weights", "scales", "error", "message"),
    [
        ([torch.ones(2, 3, 3)], None, ValueError, r"got shape \[2, 3, 3\]"),
        ([torch.ones(2, 2, dtype=torch.int64)], None, TypeError, "torch.int64"),
        ([[1.0]], None, TypeError, "got list"),
        ([torch.ones(2, 2).to_sparse()], None, TypeError, "torch.sparse_coo"),
        ([torch.ones(2, 2)], [], ValueError, "got 0 for 1 weights"),
        ([torch.ones(2, 2)], [torch.ones(3)], ValueError, r"\[2\], got \[3\]"),
        ([torch.ones(2, 2)], [torch.ones(2, dtype=torch.int32)], TypeError, "torch.int32"),
        ([torch.ones(2, 2), torch.ones(2, 2, device="meta")], None, ValueError, "must be on cpu, got meta"),
    ],
)
def test_wrong_arguments_are_errors_that_show_the_value(
    weights: list[Tensor], scales: list[Tensor] | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        filter_spectral_norms(weights, scales)


def resnet18_weights() -> list[Tensor]:
    """The weights of a CIFAR ResNet-18 of width 64: 20 convolutions, 4 800 filters, 11.2 M values."""
    shapes = [(64, 3, 3, 3)] + [(64, 64, 3, 3)] * 4
    for width in (128, 256, 512):
        shapes += [(width, width // 2, 3, 3), (width, width // 2, 1, 1)] + [(width, width, 3, 3)] * 3
    return [random(shape, torch.float32, seed=i) * 0.05 for i, shape in enumerate(shapes)]


@native
def test_norms_are_five_times_faster_than_batched_svdvals() -> None:
    """On a ResNet-18, layer by layer: most layers fit in the cache, so a busy memory bus affects the times
    little. The two methods take turns, so that noise affects both."""

    def seconds(run: Callable[[], object]) -> float:
        # With one thread, its CPU time covers all the work and excludes other load.
        start = time.thread_time()
        run()
        return time.thread_time() - start

    def both(weight: Tensor) -> tuple[float, float]:
        filters = weight.flatten(2)
        rounds = [
            (seconds(lambda: filter_spectral_norms([weight])), seconds(lambda: torch.linalg.svdvals(filters).amax(-1)))
            for _ in range(6)
        ]
        ours, theirs = zip(*rounds, strict=True)
        return min(ours), min(theirs)

    with threads(1):
        ours, theirs = (sum(times) for times in zip(*map(both, resnet18_weights()), strict=True))
    assert theirs >= 5 * ours, f"ours {ours * 1e3:.1f} ms, batched svdvals {theirs * 1e3:.1f} ms"
