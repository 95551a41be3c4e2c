"""channel_scale: values and gradients, of one map and of a stack, which has the bits of its maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bdprune.ops import _backend, channel_scale, reference

from .helpers import (
    DTYPES,
    STACKS,
    assert_error_ratio,
    layouts,
    native,
    random,
    rounding,
    stack_layouts,
    threads,
)

SHAPES = [(5, 7), (3, 4, 6, 6), (2, 64, 8, 8), (2, 3, 33, 17), (4, 1, 7, 7), (3, 21, 1, 1), (2, 5, 11), (2, 8, 2, 3, 4)]


def broadcast(mask: Tensor, z: Tensor) -> Tensor:
    return mask.view(1, -1, *[1] * (z.dim() - 2))


def gradients(product: Tensor, z: Tensor, mask: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(product, (z, mask), grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_is_at_most_twice_the_error_of_pytorch(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    z, mask, grad = (random(s, dtype, device, seed) for seed, s in enumerate([shape, shape[1:2], shape]))
    wide_z, wide_mask = z.double().requires_grad_(), mask.double().requires_grad_()
    wide = wide_z * broadcast(wide_mask, z)
    exact = (wide.detach(), *gradients(wide, wide_z, wide_mask, grad.double()))
    plain_z, plain_mask = z.clone().requires_grad_(), mask.clone().requires_grad_()
    product = plain_z * broadcast(plain_mask, z)
    plain = (product.detach(), *gradients(product, plain_z, plain_mask, grad))
    for other in layouts(z):
        for other_grad in layouts(grad):
            own_z, own_mask = other.detach().requires_grad_(), mask.clone().requires_grad_()
            scaled = channel_scale(own_z, own_mask)
            ours = (scaled.detach(), *gradients(scaled, own_z, own_mask, other_grad))
            for mine, theirs, truth in zip(ours, plain, exact, strict=True):
                assert mine.dtype == dtype
                assert_error_ratio(mine, theirs, truth, rounding(truth, dtype, z.numel() // shape[1]))


@pytest.mark.parametrize("mask_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mask_may_have_another_dtype(dtype: torch.dtype, mask_dtype: torch.dtype, device: str) -> None:
    z = random((3, 4, 5, 5), dtype, device).requires_grad_()
    mask = random((4,), mask_dtype, device, seed=1).requires_grad_()
    scaled = channel_scale(z, mask)
    assert scaled.dtype == dtype
    grad_z, grad_mask = gradients(scaled, z, mask, torch.ones_like(scaled))
    assert (grad_z.dtype, grad_mask.dtype) == (dtype, mask_dtype)
    expected = z.detach().double().sum((0, 2, 3))
    # The compiled op sums in float64; plain autograd in float32, unless z is float64.
    atol = 1e-12 if _backend.HAS_OPS else 1e-5
    assert torch.allclose(grad_mask.double(), expected, rtol=2 * torch.finfo(mask_dtype).eps, atol=atol)


def test_the_layout_is_kept(device: str) -> None:
    z, mask = random((2, 6, 4, 4), torch.float32, device), torch.ones(6, device=device)
    assert channel_scale(z, mask).is_contiguous()
    channels_last = z.contiguous(memory_format=torch.channels_last)
    assert channel_scale(channels_last, mask).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (3, 4, 0, 3), (0, 4), (3, 0, 2, 2)], ids=str)
def test_empty_maps(shape: tuple[int, ...], device: str) -> None:
    z = torch.ones(shape, device=device, requires_grad=True)
    mask = torch.ones(shape[1], device=device, requires_grad=True)
    scaled = channel_scale(z, mask)
    grad_z, grad_mask = gradients(scaled, z, mask, torch.ones_like(scaled))
    assert scaled.shape == grad_z.shape == shape
    assert torch.equal(grad_mask, torch.zeros(shape[1], device=device))


def test_zero_masks_give_zeros_and_nan_propagates(device: str) -> None:
    z = random((2, 3, 2, 2), torch.float32, device)
    z[0, 2, 0, 0] = float("nan")
    scaled = channel_scale(z, torch.tensor([0.0, 1.0, 0.0], device=device))
    assert (scaled[:, 0] == 0).all() and torch.equal(scaled[:, 1], z[:, 1]) and scaled[0, 2, 0, 0].isnan()


@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (4, 5)], ids=str)
@pytest.mark.parametrize("fastest", [False, True], ids=["nchw", "channels_last"])
def test_gradcheck_of_the_scale(shape: tuple[int, ...], fastest: bool, device: str) -> None:
    z = random(shape, device=device)
    z = (z.movedim(1, -1).contiguous().movedim(-1, 1) if fastest else z).requires_grad_()
    mask = random(shape[1:2], device=device, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(channel_scale, (z, mask))
    assert torch.autograd.gradcheck(channel_scale, (z, mask.detach()))
    assert torch.autograd.gradcheck(channel_scale, (z.detach(), mask))


@pytest.mark.parametrize("fastest", [False, True], ids=["nchw", "channels_last"])
def test_same_bits_with_one_and_two_threads(fastest: bool, device: str) -> None:
    z, grad = random((9, 70, 21, 13), torch.float32, device), random((9, 70, 21, 13), torch.float32, device, seed=1)
    if fastest:
        z, grad = (t.contiguous(memory_format=torch.channels_last) for t in (z, grad))
    mask = random((70,), torch.float32, device, seed=2)
    results = []
    for count in (1, 2, 2):
        with threads(count):
            own_z, own_mask = z.clone().requires_grad_(), mask.clone().requires_grad_()
            scaled = channel_scale(own_z, own_mask)
            results.append((scaled.detach(), *gradients(scaled, own_z, own_mask, grad)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@native
def test_opcheck(device: str) -> None:
    for shape in [(2, 3, 4, 4), (5, 3)]:
        for z in layouts(random(shape, torch.float32, device)):
            mask = random((3,), torch.float32, device, seed=1)
            wanted = (z.detach().requires_grad_(), mask.clone().requires_grad_())
            torch.library.opcheck(torch.ops.bdprune.channel_scale.default, wanted)
            grad = random(shape, torch.float32, device, seed=2)
            for need in [(True, True), (True, False), (False, True), (False, False)]:
                torch.library.opcheck(torch.ops.bdprune.channel_scale_backward.default, (grad, z, mask, *need))


def test_wrong_arguments_are_errors_that_show_the_value() -> None:
    z = torch.ones(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"mask must be \[3\].*\[4\]"):
        channel_scale(z, torch.ones(4))
    with pytest.raises(ValueError, match=r"got shape \[3\]"):
        channel_scale(torch.ones(3), torch.ones(3))
    with pytest.raises(TypeError, match=r"torch\.bool"):
        channel_scale(z, torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match="got float"):
        channel_scale(z, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be on cpu, got meta"):
        channel_scale(z, torch.ones(3, device="meta"))


# ------------------------------------------------------------------------------------------------- stacks


def stack_gradients(product: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    grad = random(tuple(product.shape), product.dtype, str(product.device), seed=9)
    return torch.autograd.grad(product, inputs, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", STACKS, ids=str)
def test_a_scaled_stack_has_the_bits_of_its_maps(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    mask = random((shape[0], shape[2]), dtype, device, seed=1)
    for z in stack_layouts(random(shape, dtype, device)):
        own_z, own_mask = z.detach().requires_grad_(), mask.clone().requires_grad_()
        stacked = channel_scale(own_z, own_mask)
        grad_z, grad_mask = stack_gradients(stacked, own_z, own_mask)
        grad = random(shape, dtype, device, seed=9)
        for g in range(shape[0]):
            one_z, one_mask = z[g].detach().requires_grad_(), mask[g].clone().requires_grad_()
            one = channel_scale(one_z, one_mask)
            assert torch.equal(stacked[g], one)
            one_grad_z, one_grad_mask = torch.autograd.grad(one, (one_z, one_mask), grad[g])
            assert torch.equal(grad_z[g], one_grad_z)
            # A stack with gaps or of one repeated map is copied to NCHW before the sum; the single map may not be.
            assert torch.allclose(grad_mask[g], one_grad_mask, rtol=4 * torch.finfo(dtype).eps, atol=1e-12)
            if z.is_contiguous():
                assert torch.equal(grad_mask[g], one_grad_mask)


def test_the_layout_of_a_dense_stack_is_kept(device: str) -> None:
    z = stack_layouts(random((2, 3, 6, 4, 4), torch.float32, device))[1]
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
    for z in stack_layouts(random((2, 4, 3, 4, 4), torch.float32, device)):
        torch.library.opcheck(torch.ops.bdprune.channel_scale.default, (z.detach(), mask))
        grad = random((2, 4, 3, 4, 4), torch.float32, device, seed=2)
        for need in [(True, True), (True, False), (False, True)]:
            torch.library.opcheck(torch.ops.bdprune.channel_scale_backward.default, (grad, z, mask, *need))


@native
@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)], ids=str)
def test_the_reference_scales_a_stack(need: tuple[bool, bool], device: str) -> None:
    grad, z, mask = (random(s, torch.float64, device, i) for i, s in enumerate([(2, 4, 3, 5)] * 2 + [(2, 3)]))
    assert torch.equal(reference.channel_scale(z, mask), torch.ops.bdprune.channel_scale(z, mask))
    ours = torch.ops.bdprune.channel_scale_backward(grad, z, mask, *need)
    for mine, theirs in zip(ours, reference.channel_scale_backward(grad, z, mask, *need), strict=True):
        assert mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=1e-13)


@pytest.mark.parametrize("fastest", [False, True], ids=["nchw", "channels_last"])
def test_stacks_have_the_same_bits_with_one_and_two_threads(fastest: bool, device: str) -> None:
    z = random((3, 5, 70, 21, 13), torch.float32, device)
    z = stack_layouts(z)[1] if fastest else z
    mask = random((3, 70), torch.float32, device, seed=2)
    results = []
    for count in (1, 2):
        with threads(count):
            own_z, own_mask = z.clone().requires_grad_(), mask.clone().requires_grad_()
            scaled = channel_scale(own_z, own_mask)
            results.append((scaled.detach(), *stack_gradients(scaled, own_z, own_mask)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_wrong_stacks_are_errors_that_show_the_value() -> None:
    z, mask = torch.ones(2, 3, 4, 5), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"mask must be \[2, 4\].*got shape \[3, 4\]"):
        channel_scale(z, torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"z must be \[G, N, C\].*got shape \[2, 4\]"):
        channel_scale(torch.ones(2, 4), mask)
