"""ChannelMoments compared with float64 sums over all the data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bdprune.ops import ChannelMoments, reference

from .helpers import DTYPES, STACKS, assert_error_ratio, native, random, rounding, stack_layouts, threads

SHAPES = [
    (5, 7),
    (300, 40),
    (4, 3, 32, 32),
    (2, 1, 5, 5),
    (3, 64, 8, 8),
    (3, 37, 7, 7),
    (6, 33, 1, 1),
    (2, 70, 9),
    (2, 16, 3, 4, 5),
    (1, 130, 2, 2),
]


def columns(x: Tensor) -> Tensor:
    """x [N, C, *] as float64 [C, N * P]."""
    return x.double().transpose(0, 1).flatten(1)


def exact_norm(x: Tensor) -> Tensor:
    maps = x.double().flatten(2) if x.dim() > 2 else x.double().unsqueeze(-1)
    return maps.square().mean(-1).sqrt().mean(0)


def moments_of(*batches: Tensor) -> ChannelMoments:
    moments = ChannelMoments(batches[0].shape[1], batches[0].device)
    for batch in batches:
        moments.update(batch)
    return moments


def layouts(x: Tensor) -> list[Tensor]:
    """The same values in several memory orders."""
    strided = x.new_zeros(x.shape[0], 2 * x.shape[1], *x.shape[2:])[:, ::2].copy_(x)
    channels_last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return [x, strided, channels_last]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_is_at_most_twice_the_error_of_pytorch(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    x = random(shape, dtype, device) * 2 + 1
    exact = columns(x)
    plain = exact.to(torch.float64 if dtype == torch.float64 else torch.float32)
    for other in layouts(x):
        moments = moments_of(other)
        assert (moments.count, moments.positions) == (shape[0], exact.shape[1])
        mean, covariance = exact.mean(1), exact.cov(correction=0).view(shape[1], -1)
        plain_covariance = plain.cov(correction=0).view(shape[1], -1)
        assert_error_ratio(moments.mean, plain.mean(1), mean, rounding(mean, plain.dtype, exact.shape[1]))
        allowance = rounding(covariance, plain.dtype, exact.shape[1])
        assert_error_ratio(moments.covariance, plain_covariance, covariance, allowance)
        assert torch.equal(moments.variance, moments.covariance.diagonal())
        assert moments.mean.dtype == moments.covariance.dtype == torch.float64
        assert torch.allclose(moments.activation_norm, exact_norm(x), rtol=1e-13, atol=0.0)


def test_hand_computed(device: str) -> None:
    x = torch.tensor([[[3.0, 4.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]]], device=device)  # [2, 2, 2]
    moments = moments_of(x)
    assert (moments.count, moments.positions) == (2, 4)
    assert moments.mean.tolist() == [1.75, 1.0]
    assert moments.variance[0].item() == pytest.approx(25 / 4 - 1.75**2, abs=1e-12)
    assert moments.activation_norm.tolist() == pytest.approx([2.5 / 2**0.5, 1.0], abs=1e-12)
    assert moments.correlation().tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_correlation_is_right_at_a_mean_of_30_sigma(dtype: torch.dtype, device: str) -> None:
    mixing = random((16, 16), seed=1)
    x = torch.einsum("nchw,dc->ndhw", random((32, 16, 16, 16)), mixing)
    x = (x / x.std() + 30.0).to(device=device, dtype=dtype)
    exact = torch.corrcoef(columns(x))
    for other in layouts(x):
        ours = moments_of(*other.split(5)).correlation()
        assert (ours - exact).abs().max().item() <= (2e-7 if dtype == torch.float32 else 1e-13)
        assert torch.equal(ours, ours.T) and torch.equal(ours.diagonal(), torch.ones(16, device=device).double())


def test_batches_and_merges_equal_one_pass(device: str) -> None:
    x = random((24, 9, 6, 6), device=device) * 3 - 20
    whole = moments_of(x)
    streamed = moments_of(*x.split([1, 7, 16]))
    merged = moments_of(x[:5])
    merged.merge(moments_of(x[5:6]))
    merged.merge(ChannelMoments(9, device))
    merged.merge(moments_of(x[6:]))
    into_empty = ChannelMoments(9, device)
    into_empty.merge(whole)
    for other in (streamed, merged, into_empty):
        assert (other.count, other.positions) == (24, 24 * 36)
        for name in ("mean", "variance", "activation_norm", "covariance"):
            assert torch.allclose(getattr(other, name), getattr(whole, name), rtol=1e-11, atol=1e-11), name
        assert torch.allclose(other.correlation(), whole.correlation(), atol=1e-12)


def test_merging_does_not_change_the_other_moments(device: str) -> None:
    first, second = moments_of(random((3, 2, 2, 2), device=device)), moments_of(random((4, 2, 2, 2), device=device))
    before = second.covariance.clone()
    empty = ChannelMoments(2, device)
    empty.merge(second)
    empty.update(random((3, 2, 2, 2), device=device, seed=2))
    first.merge(second)
    assert torch.equal(second.covariance, before) and second.count == 4


def test_shards_with_distant_means_merge(device: str) -> None:
    x = torch.cat([random((50, 3), device=device), random((70, 3), device=device, seed=1) + 1e4])
    merged = moments_of(x[:50])
    merged.merge(moments_of(x[50:]))
    assert torch.allclose(merged.covariance, columns(x).cov(correction=0), rtol=1e-11)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, -3e-20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_channel_has_no_correlation(value: float, dtype: torch.dtype, device: str) -> None:
    x = random((40, 4, 5, 5), dtype, device)
    x[:, 2] = value
    ours = moments_of(*x.split(7)).correlation()
    expected = torch.zeros(4, dtype=torch.float64, device=device)
    expected[2] = 1.0
    assert torch.equal(ours[2], expected) and torch.equal(ours[:, 2], expected)
    exact = torch.corrcoef(columns(x[:, [0, 1, 3]]))
    assert torch.allclose(ours[[0, 1, 3]][:, [0, 1, 3]], exact, atol=1e-6)


def test_a_bad_value_affects_only_its_channel(device: str) -> None:
    x = random((4, 5, 3, 3), torch.float32, device)
    exact = torch.corrcoef(columns(x))
    x[2, 1, 0, 0] = float("nan")
    moments = moments_of(x)
    kept = [0, 2, 3, 4]
    assert moments.mean.isnan().tolist() == [False, True, False, False, False]
    assert moments.correlation()[1].isnan().all()
    assert torch.allclose(moments.correlation()[kept][:, kept], exact[kept][:, kept], atol=1e-6)


def test_empty_batches_change_nothing(device: str) -> None:
    x = random((3, 4, 2, 2), device=device)
    moments = moments_of(x[:0], x, x[:, :, :0], x[:0])
    assert (moments.count, moments.positions) == (3, 12)
    assert torch.equal(moments.covariance, moments_of(x).covariance)


def test_large_float64_values_keep_their_shift(device: str) -> None:
    x = random((50, 3), device=device) * 1e90 + 1e100
    ours = moments_of(x).correlation()
    scaled = columns((x - 1e100) / 1e90)
    assert torch.allclose(ours, torch.corrcoef(scaled), atol=1e-5)


@pytest.mark.parametrize("fastest", [False, True], ids=["nchw", "channels_last"])
def test_same_bits_with_one_and_two_threads(fastest: bool, device: str) -> None:
    x = random((9, 300, 9, 9), torch.float32, device) + 2
    if fastest:
        x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for count in (1, 2, 2):
        with threads(count):
            moments = moments_of(*x.split(4))
            results.append((moments.covariance, moments.mean, moments.activation_norm))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["mean", "variance", "covariance", "activation_norm", "correlation"])
def test_no_data_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="no values have been added"):
        result = getattr(ChannelMoments(3), name)
        result()


def test_wrong_arguments_are_errors_that_show_the_value() -> None:
    moments = ChannelMoments(3)
    with pytest.raises(ValueError, match=r"3 channels, got shape \[2, 4\]"):
        moments.update(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"got shape \[3\]"):
        moments.update(torch.ones(3))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        moments.update(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be on cpu, got meta"):
        moments.update(torch.ones(2, 3, device="meta"))
    with pytest.raises(ValueError, match="4 channels into 3"):
        moments.merge(ChannelMoments(4))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ChannelMoments(0)
    with pytest.raises(ValueError, match="ieee or tf32x3, got 'tf32'"):
        ChannelMoments(3, precision="tf32")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tf32x3_differs_from_float32_only_in_the_last_bits(dtype: torch.dtype, device: str) -> None:
    x = random((6, 70, 9, 7), dtype, device) + 3
    ours = ChannelMoments(70, device, precision="tf32x3")
    ours.update(x)
    exact = moments_of(x)
    assert torch.allclose(ours.covariance, exact.covariance, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.mean, exact.mean)


def state(channels: int, device: str) -> list[Tensor]:
    sizes: list[tuple[int, ...]] = [(channels, channels), (channels,), (channels,)]
    return [torch.zeros(size, dtype=torch.float64, device=device) for size in sizes]


@native
def test_opcheck(device: str) -> None:
    op = torch.ops.bdprune.channel_moments_update_.default
    for shape in [(3, 4, 5, 5), (3, 4)]:
        shift = torch.zeros(4, dtype=torch.float64, device=device)
        torch.library.opcheck(op, (*state(4, device), random(shape, torch.float32, device), shift))


@native
def test_compiles_without_a_graph_break(device: str) -> None:
    x, shift = random((3, 4, 5, 5), torch.float32, device), torch.zeros(4, dtype=torch.float64, device=device)

    def cross(x: Tensor) -> Tensor:
        sums = state(4, device)
        torch.ops.bdprune.channel_moments_update_(*sums, x * 2, shift)
        return sums[0] + 1

    compiled = torch.compile(cross, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), cross(x))


# ------------------------------------------------------------------------------------------------- stacks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", STACKS, ids=str)
def test_moments_of_a_stack_have_the_bits_of_its_maps(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    for x in stack_layouts(random(shape, dtype, device) + 3)[:2]:
        half = shape[1] // 2
        batches = [x[:, :half], x[:, half:]]
        stacked = ChannelMoments(shape[2], device, stack=shape[0])
        merged = ChannelMoments(shape[2], device, stack=shape[0])
        for batch in batches:
            stacked.update(batch)
            part = ChannelMoments(shape[2], device, stack=shape[0])
            part.update(batch)
            merged.merge(part)
        for g in range(shape[0]):
            one = ChannelMoments(shape[2], device)
            for batch in batches:
                one.update(batch[g])
            assert (stacked.count, stacked.positions) == (one.count, one.positions)
            for name in ("mean", "variance", "covariance", "activation_norm"):
                assert torch.equal(getattr(stacked, name)[g], getattr(one, name)), name
            assert torch.equal(stacked.correlation()[g], one.correlation())
        assert torch.allclose(merged.covariance, stacked.covariance, rtol=1e-5, atol=1e-5)


@native
def test_opcheck_of_moments_of_a_stack(device: str) -> None:
    sums = [torch.zeros(size, dtype=torch.float64, device=device) for size in [(2, 4, 4), (2, 4), (2, 4)]]
    x, shift = random((2, 3, 4, 5, 5), torch.float32, device), torch.zeros(2, 4, dtype=torch.float64, device=device)
    torch.library.opcheck(torch.ops.bdprune.channel_moments_update_.default, (*sums, x, shift))
    plain = [torch.zeros_like(part) for part in sums]
    torch.ops.bdprune.channel_moments_update_(*sums, x, shift)
    reference.channel_moments_update_(*plain, x, shift)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-4) for a, b in zip(sums, plain, strict=True))


def test_wrong_stacks_are_errors_that_show_the_value() -> None:
    with pytest.raises(ValueError, match=r"a stack of 2 maps, got shape \[3, 1, 4\]"):
        ChannelMoments(4, stack=2).update(torch.ones(3, 1, 4))
    with pytest.raises(ValueError, match="stack must be at least 1"):
        ChannelMoments(4, stack=0)
    with pytest.raises(ValueError, match="a stack of None into one of 2"):
        ChannelMoments(4, stack=2).merge(ChannelMoments(4))
