import pytest
import torch

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Rows of whole and incomplete vectors, one position, one channel, [N, C], 3-D maps, more channels than a block is wide.
SHAPES = [(3, 5, 4, 6), (2, 8, 4, 4), (2, 16, 1, 1), (4, 1, 5, 5), (3, 8), (7, 33), (2, 16, 2, 3, 4), (2, 140, 3, 3)]


def layouts(z: torch.Tensor) -> list[torch.Tensor]:
    """z in every memory order that a kernel supports, and in two that it has to copy."""
    found = [z]
    if z.dim() == 4:
        found += [z.contiguous(memory_format=torch.channels_last), z.transpose(2, 3), torch.cat([z, z], 1)[:, ::2]]
    return found


def per_channel(mask: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return mask.view(-1, *[1] * (z.dim() - 2))


def channel_sum(x: torch.Tensor) -> torch.Tensor:
    return x.sum([d for d in range(x.dim()) if d != 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_rounds_as_pytorch_does(emulated, randn, shape, dtype):
    for z in layouts(randn(*shape, dtype=dtype)):
        mask = randn(shape[1], dtype=dtype, seed=1)
        y = emulated.ops.channel_scale(z, mask)
        assert y.dtype == dtype
        assert torch.equal(y, z * per_channel(mask, z))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(emulated, randn, shape, dtype):
    for z in layouts(randn(*shape, dtype=dtype)):
        mask = randn(shape[1], dtype=dtype, seed=1)
        # In z's memory order, and in the other one.
        for grad in (torch.empty_like(z), torch.empty(z.shape, dtype=dtype)):
            grad.copy_(randn(*z.shape, dtype=dtype, seed=2))
            grad_z, grad_mask = emulated.ops.channel_scale_backward(grad, z, mask, True, True)
            assert torch.equal(grad_z, grad * per_channel(mask, z))
            exact = channel_sum(grad.double() * z.double())
            bound = (
                channel_sum((grad.double() * z.double()).abs())
                * torch.finfo(dtype).eps
                * (8 if dtype == torch.float64 else 1)
            )
            assert ((grad_mask.double() - exact).abs() <= bound).all()


def test_layout_of_dense_maps_is_kept(emulated, randn):
    z = randn(2, 8, 3, 4).contiguous(memory_format=torch.channels_last)
    assert emulated.ops.channel_scale(z, randn(8)).stride() == z.stride()
    grad_z, _ = emulated.ops.channel_scale_backward(randn(2, 8, 3, 4), z, randn(8), True, True)
    assert grad_z.stride() == z.stride()


def test_mask_keeps_its_own_dtype(emulated, randn):
    z, mask = randn(2, 4, 3, 3, dtype=torch.float16), randn(4, seed=1)
    assert emulated.ops.channel_scale(z, mask).dtype == torch.float16
    grad_z, grad_mask = emulated.ops.channel_scale_backward(z, z, mask, True, True)
    assert (grad_z.dtype, grad_mask.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_unaligned_maps(emulated, randn, offset):
    z = randn(2 * 8 * 16 + offset)[offset:].view(2, 8, 4, 4)
    mask = randn(8, seed=1)
    assert torch.equal(emulated.ops.channel_scale(z, mask), z * per_channel(mask, z))
    grad_z, grad_mask = emulated.ops.channel_scale_backward(z, z, mask, True, True)
    assert torch.equal(grad_z, z * per_channel(mask, z))
    torch.testing.assert_close(grad_mask, channel_sum(z * z))


def test_expanded_gradient(emulated, randn):
    z, mask = randn(2, 8, 4, 4), randn(8, seed=1)
    grad = torch.tensor(0.5).expand(2, 8, 4, 4)
    grad_z, grad_mask = emulated.ops.channel_scale_backward(grad, z, mask, True, True)
    assert torch.equal(grad_z, grad * per_channel(mask, z))
    torch.testing.assert_close(grad_mask, channel_sum(0.5 * z))


@pytest.mark.parametrize("channels_last", [False, True])
def test_only_the_needed_gradients_are_computed(emulated, randn, channels_last):
    z = randn(2, 8, 4, 4)
    z = z.contiguous(memory_format=torch.channels_last) if channels_last else z
    mask = randn(8, seed=1)
    both = emulated.ops.channel_scale_backward(z, z, mask, True, True)
    grad_z, none = emulated.ops.channel_scale_backward(z, z, mask, True, False)
    assert torch.equal(grad_z, both[0])
    assert none.shape == (0,)
    none, grad_mask = emulated.ops.channel_scale_backward(z, z, mask, False, True)
    assert torch.equal(grad_mask, both[1])
    assert none.shape == (0,)


@pytest.mark.parametrize("channels_last", [False, True])
def test_sums_split_over_blocks(emulated, randn, channels_last):
    z = randn(3, 4, 96, 96)  # 27,648 elements per channel: several splits in either order
    z = z.contiguous(memory_format=torch.channels_last) if channels_last else z
    grad, mask = randn(3, 4, 96, 96, seed=2), torch.ones(4)
    _, grad_mask = emulated.ops.channel_scale_backward(grad, z, mask, False, True)
    torch.testing.assert_close(grad_mask, channel_sum(grad.double() * z.double()).float(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_result_does_not_depend_on_the_order_of_threads(emulated, randn, channels_last):
    z = randn(2, 48, 9, 9)
    z = z.contiguous(memory_format=torch.channels_last) if channels_last else z
    results = []
    for seed in range(3):
        emulated.seed(seed)
        results.append(emulated.ops.channel_scale_backward(z, z, randn(48, seed=1), True, True))
    assert all(torch.equal(a, b) for pair in results[1:] for a, b in zip(pair, results[0], strict=True))


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3), (0, 4)])
def test_empty(emulated, shape):
    z, mask = torch.empty(shape), torch.ones(shape[1])
    assert emulated.ops.channel_scale(z, mask).shape == shape
    grad_z, grad_mask = emulated.ops.channel_scale_backward(z, z, mask, True, True)
    assert grad_z.shape == shape
    assert torch.equal(grad_mask, torch.zeros(shape[1]))


def test_wrong_arguments(emulated, randn):
    z = randn(2, 4, 3, 3)
    with pytest.raises(RuntimeError, match="one entry per channel"):
        emulated.ops.channel_scale(z, torch.ones(3))
    with pytest.raises(RuntimeError, match="floating"):
        emulated.ops.channel_scale(z, torch.ones(4, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="shape of z"):
        emulated.ops.channel_scale_backward(z[:1], z, torch.ones(4), True, True)
    with pytest.raises(RuntimeError, match="dtype of z"):
        emulated.ops.channel_scale_backward(z.double(), z, torch.ones(4), True, True)


# ------------------------------------------------------------------------------------------------- stacks

STACKS = [(3, 2, 5, 4, 6), (2, 3, 16, 1, 1), (2, 4, 33), (3, 2, 140, 3, 3), (1, 2, 8, 4, 4), (2, 3, 4, 96, 60)]


def stack_layouts(z):
    return [z, z.movedim(2, -1).contiguous().movedim(-1, 2)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", STACKS)
def test_a_stack_has_the_bits_of_its_maps(emulated, randn, shape, dtype):
    mask = randn(shape[0], shape[2], dtype=dtype, seed=1)
    for z in stack_layouts(randn(*shape, dtype=dtype)):
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


def test_wrong_stacks(emulated, randn):
    with pytest.raises(RuntimeError, match="one entry per channel"):
        emulated.ops.channel_scale(randn(2, 3, 4, 5), torch.ones(3, 4))
    with pytest.raises(RuntimeError, match="z must be"):
        emulated.ops.channel_scale(randn(2, 4), torch.ones(2, 4))
