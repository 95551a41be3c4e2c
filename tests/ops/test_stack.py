"""The stack axis of the ops: G maps, models or masks in one call give what G calls give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bdprune.ops import ChannelMoments, _backend, channel_scale, masked_conv2d, reference

from .helpers import DTYPES, random, threads

native = pytest.mark.skipif(not _backend.HAS_OPS, reason="the compiled ops are not built or not wanted")

SHAPES = [(3, 2, 5, 4, 6), (2, 1, 64, 3, 3), (4, 3, 7), (1, 2, 6, 5, 5), (2, 600, 3, 1, 1), (3, 2, 4, 2, 3, 2)]


def layouts(z: Tensor) -> list[Tensor]:
    """A stack [G, N, C, *] in plain and channels_last order, with gaps, and one map for all its entries."""
    channels_last = z.movedim(2, -1).contiguous().movedim(-1, 2)
    strided = torch.cat([z, z], 1)[:, ::2]
    return [z, channels_last, strided, z[:1].expand_as(z)]


def gradients(product: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    grad = random(tuple(product.shape), product.dtype, str(product.device), seed=9)
    return torch.autograd.grad(product, inputs, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scaled_stack_has_the_bits_of_its_maps(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    mask = random((shape[0], shape[2]), dtype, device, seed=1)
    for z in layouts(random(shape, dtype, device)):
        own_z, own_mask = z.detach().requires_grad_(), mask.clone().requires_grad_()
        stacked = channel_scale(own_z, own_mask)
        grad_z, grad_mask = gradients(stacked, own_z, own_mask)
        grad = random(shape, dtype, device, seed=9)
        for g in range(shape[0]):
            one_z, one_mask = z[g].detach().requires_grad_(), mask[g].clone().requires_grad_()
            one = channel_scale(one_z, one_mask)
            assert torch.equal(stacked[g], one)
            one_grad_z, one_grad_mask = torch.autograd.grad(one, (one_z, one_mask), grad[g])
            assert torch.equal(grad_z[g], one_grad_z)
            # A stack with gaps, or of one map, is copied to NCHW before it is summed; the single map need not be.
            assert torch.allclose(grad_mask[g], one_grad_mask, rtol=4 * torch.finfo(dtype).eps, atol=1e-12)
            if z.is_contiguous():
                assert torch.equal(grad_mask[g], one_grad_mask)


def test_layout_of_a_dense_stack_is_kept(device: str) -> None:
    z = layouts(random((2, 3, 6, 4, 4), torch.float32, device))[1]
    assert channel_scale(z, torch.ones(2, 6, device=device)).stride() == z.stride()


@pytest.mark.parametrize("shape", [(0, 2, 4, 3, 3), (2, 0, 4, 3, 3), (2, 3, 4, 0, 3), (2, 3, 0, 2, 2)], ids=str)
def test_empty_stacks(shape: tuple[int, ...], device: str) -> None:
    z = torch.ones(shape, device=device, requires_grad=True)
    mask = torch.ones(shape[0], shape[2], device=device, requires_grad=True)
    scaled = channel_scale(z, mask)
    grad_z, grad_mask = torch.autograd.grad(scaled, (z, mask), torch.ones_like(scaled))
    assert scaled.shape == grad_z.shape == shape
    assert torch.equal(grad_mask, torch.zeros(shape[0], shape[2], device=device))


def test_gradcheck_of_a_stack(device: str) -> None:
    z, mask = random((2, 2, 3, 2, 2), device=device).requires_grad_(), random((2, 3), device=device, seed=1)
    assert torch.autograd.gradcheck(channel_scale, (z, mask.requires_grad_()))


@native
def test_opcheck_of_a_stack(device: str) -> None:
    mask = random((2, 3), torch.float32, device, seed=1)
    for z in layouts(random((2, 4, 3, 4, 4), torch.float32, device)):
        torch.library.opcheck(torch.ops.bdprune.channel_scale.default, (z.detach(), mask))
        grad = random((2, 4, 3, 4, 4), torch.float32, device, seed=2)
        for need in [(True, True), (True, False), (False, True)]:
            torch.library.opcheck(torch.ops.bdprune.channel_scale_backward.default, (grad, z, mask, *need))


@native
@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)], ids=str)
def test_reference_of_a_stack(need: tuple[bool, bool], device: str) -> None:
    grad, z, mask = (random(s, torch.float64, device, i) for i, s in enumerate([(2, 4, 3, 5)] * 2 + [(2, 3)]))
    assert torch.equal(reference.channel_scale(z, mask), torch.ops.bdprune.channel_scale(z, mask))
    ours = torch.ops.bdprune.channel_scale_backward(grad, z, mask, *need)
    for mine, theirs in zip(ours, reference.channel_scale_backward(grad, z, mask, *need), strict=True):
        assert mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=1e-13)


@pytest.mark.parametrize("fastest", [False, True], ids=["nchw", "channels_last"])
def test_same_bits_with_one_and_two_threads(fastest: bool, device: str) -> None:
    z = random((3, 5, 70, 21, 13), torch.float32, device)
    z = layouts(z)[1] if fastest else z
    mask = random((3, 70), torch.float32, device, seed=2)
    results = []
    for count in (1, 2):
        with threads(count):
            own_z, own_mask = z.clone().requires_grad_(), mask.clone().requires_grad_()
            scaled = channel_scale(own_z, own_mask)
            results.append((scaled.detach(), *gradients(scaled, own_z, own_mask)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


CONVS: list[dict[str, Any]] = [
    {"x": (3, 4, 6, 6), "weight": (5, 4, 3, 3)},
    {"x": (2, 4, 7, 7), "weight": (6, 4, 3, 3), "stride": 2, "padding": 1},
    {"x": (2, 1, 5, 5), "weight": (3, 1, 3, 3), "padding": "same"},
    {"x": (2, 6, 5, 5), "weight": (4, 6, 1, 1)},
    {"x": (2, 4, 8, 6), "weight": (6, 2, 3, 3), "padding": (2, 1), "dilation": (2, 1), "groups": 2},
    {"x": (0, 4, 6, 6), "weight": (5, 4, 3, 3)},
]


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("own_weight", [False, True], ids=["one_model", "own_weights"])
@pytest.mark.parametrize("own_x", [False, True], ids=["one_batch", "own_batches"])
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_stack_of_convs_equals_convs(
    case: dict[str, Any], own_x: bool, own_weight: bool, with_bias: bool, device: str
) -> None:
    settings = {key: value for key, value in case.items() if key not in ("x", "weight")}
    x = random((3, *case["x"]) if own_x else case["x"], torch.float64, device)
    weight = random((3, *case["weight"]) if own_weight else case["weight"], torch.float64, device, seed=1)
    mask = random((3, case["weight"][0]), torch.float64, device, seed=2)
    bias = random(tuple(weight.shape[:-3]), torch.float64, device, seed=3) if with_bias else None
    leaves = [x.requires_grad_(), weight.requires_grad_(), mask.requires_grad_()]
    stacked = masked_conv2d(x, weight, mask, bias, **settings)
    separate = torch.stack(
        [
            masked_conv2d(
                x[g] if own_x else x,
                weight[g] if own_weight else weight,
                mask[g],
                bias if bias is None or not own_weight else bias[g],
                **settings,
            )
            for g in range(3)
        ]
    )
    assert stacked.shape == separate.shape
    assert torch.equal(stacked, separate) if own_weight else torch.allclose(stacked, separate, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(stacked, *leaves), gradients(separate, *leaves), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-10)


def test_wrong_stacks_say_what_they_got() -> None:
    z, mask = torch.ones(2, 3, 4, 5), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"mask must be \[2, 4\].*got shape \[3, 4\]"):
        channel_scale(z, torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"z must be \[G, N, C\].*got shape \[2, 4\]"):
        channel_scale(torch.ones(2, 4), mask)
    x, weight = torch.ones(2, 1, 3, 5, 5), torch.ones(2, 4, 3, 3, 3)
    with pytest.raises(ValueError, match=r"x must have 4 dimensions, or 5 with 3 first"):
        masked_conv2d(x, weight, torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"weight must have 4 dimensions, got shape \[2, 4, 3, 3, 3\]"):
        masked_conv2d(x[0], weight, torch.ones(4))
    with pytest.raises(ValueError, match=r"bias must be \[2, 4\], got shape \[4\]"):
        masked_conv2d(x, weight, mask, torch.ones(4))
    with pytest.raises(ValueError, match=r"a stack of 2 maps, got shape \[3, 1, 4\]"):
        ChannelMoments(4, stack=2).update(torch.ones(3, 1, 4))
    with pytest.raises(ValueError, match="stack must be at least 1"):
        ChannelMoments(4, stack=0)
    with pytest.raises(ValueError, match="a stack of None into one of 2"):
        ChannelMoments(4, stack=2).merge(ChannelMoments(4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_of_a_stack_have_the_bits_of_its_maps(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    for x in layouts(random(shape, dtype, device) + 3)[:2]:
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
