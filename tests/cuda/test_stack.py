"""The stack axis: one launch over G maps gives the bits that each of them gets alone."""

import pytest
import torch

DTYPES = [torch.float16, torch.float32, torch.float64]
SHAPES = [(3, 2, 5, 4, 6), (2, 3, 16, 1, 1), (2, 4, 33), (3, 2, 140, 3, 3), (1, 2, 8, 4, 4), (2, 3, 4, 96, 60)]


def layouts(z):
    return [z, z.movedim(2, -1).contiguous().movedim(-1, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scale(emulated, randn, shape, dtype):
    mask = randn(shape[0], shape[2], dtype=dtype, seed=1)
    for z in layouts(randn(*shape, dtype=dtype)):
        grad = torch.empty_like(z).copy_(randn(*shape, dtype=dtype, seed=2))
        y = emulated.ops.channel_scale(z, mask)
        grad_z, grad_mask = emulated.ops.channel_scale_backward(grad, z, mask, True, True)
        only_z, _ = emulated.ops.channel_scale_backward(grad, z, mask, True, False)
        assert y.stride() == grad_z.stride() == z.stride()
        for g in range(shape[0]):
            assert torch.equal(y[g], emulated.ops.channel_scale(z[g], mask[g]))
            alone = emulated.ops.channel_scale_backward(grad[g], z[g], mask[g], True, True)
            assert torch.equal(grad_z[g], alone[0]) and torch.equal(only_z[g], alone[0])
            assert torch.equal(grad_mask[g], alone[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_moments(emulated, randn, shape, dtype):
    shift = randn(shape[0], shape[2], seed=1).double()
    for x in layouts(randn(*shape, dtype=dtype)):
        state = [torch.zeros(s, dtype=torch.float64) for s in ((*shift.shape, shape[2]), shift.shape, shift.shape)]
        emulated.ops.channel_moments_update_(*state, x, shift)
        for g in range(shape[0]):
            alone = [torch.zeros(part.shape[1:], dtype=torch.float64) for part in state]
            emulated.ops.channel_moments_update_(*alone, x[g], shift[g])
            assert all(torch.equal(part[g], one) for part, one in zip(state, alone, strict=True))


def test_wrong_stacks(emulated, randn):
    with pytest.raises(RuntimeError, match="one entry per channel"):
        emulated.ops.channel_scale(randn(2, 3, 4, 5), torch.ones(3, 4))
    with pytest.raises(RuntimeError, match="z must be"):
        emulated.ops.channel_scale(randn(2, 4), torch.ones(2, 4))
