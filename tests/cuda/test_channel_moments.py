import pytest
import torch

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# One tile, several tiles, incomplete tiles, one channel, one position, one sample, [N, C], 3-D maps.
SHAPES = [
    (3, 5, 4, 6),
    (2, 64, 4, 8),
    (2, 65, 3, 3),
    (1, 130, 5, 7),
    (40, 3, 1, 1),
    (50, 70),
    (9, 1, 4, 4),
    (2, 6, 2, 3, 4),
]

# Tensor cores truncate instead of rounding, so sums of squares drift: 96 half ulps over a run of 128 positions, halved
# because the sums grow from zero.
CUT_OFF = 4e-6


def moments(ops, x, shift, state=None, tensor_cores=False):
    channels = x.size(1)
    cross, total, norms = state or (
        torch.zeros(s, dtype=torch.float64) for s in ((channels, channels), channels, channels)
    )
    ops.channel_moments_update_(cross, total, norms, x, shift, tensor_cores)
    return cross, total, norms


def exact(x, shift):
    rows = x.double().flatten(2) if x.dim() > 2 else x.double().unsqueeze(2)
    flat = rows.transpose(0, 1).flatten(1) - shift[:, None]
    return flat @ flat.T, flat.sum(1), (rows.square().mean(2).sqrt()).sum(0)


def check(found, x, shift, narrow=1e-6):
    cross, total, norms = exact(x, shift)
    scale = cross.diagonal().sqrt()
    wide = x.dtype == torch.float64
    # Products are float32: the error of an entry is a few ulp of the norms of its two channels.
    assert ((found[0] - cross).abs() <= (1e-14 if wide else narrow) * scale[:, None] * scale).all()
    torch.testing.assert_close(found[1], total, rtol=0, atol=1e-12 * float(scale.max()) * x.numel() ** 0.5)
    torch.testing.assert_close(found[2], norms, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments(emulated, randn, shape, dtype):
    shift = randn(shape[1], seed=1).double()
    x = randn(*shape, dtype=dtype)
    found = moments(emulated.ops, x, shift)
    check(found, x, shift)
    assert torch.equal(found[0], found[0].T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_three_tf32_products_are_as_good_as_a_float32_one(emulated, randn, shape, dtype):
    shift = randn(shape[1], seed=1).double()
    x = randn(*shape, dtype=dtype)
    for own in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        found = moments(emulated.ops, own, shift, tensor_cores=True)
        check(found, own, shift, CUT_OFF)
        assert torch.equal(found[0], found[0].T)
        exact = moments(emulated.ops, own, shift)
        assert torch.equal(found[1], exact[1]) and torch.equal(found[2], exact[2])
        assert dtype != torch.float64 or torch.equal(found[0], exact[0])


def test_three_tf32_products_far_from_the_origin(emulated, randn):
    x = randn(2, 4, 29, 29) + 30  # 1,682 positions: several runs and splits, the last ones incomplete
    shift = x[0].mean((1, 2)).double()
    results = []
    for seed in range(2):
        emulated.seed(seed)
        found = moments(emulated.ops, x, shift, tensor_cores=True)
        check(found, x, shift, CUT_OFF)
        results.append(found[0])
    assert torch.equal(*results)
    assert not torch.equal(results[0], moments(emulated.ops, x, shift)[0]), "the tensor cores should have been used"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_layouts(emulated, randn, dtype):
    shift = randn(70, seed=1).double()
    x = randn(2, 70, 6, 5, dtype=dtype)
    for view in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), torch.cat([x, x], 1)[:, ::2]):
        check(moments(emulated.ops, view, shift), view, shift)


@pytest.mark.parametrize("channels_last", [False, True])
def test_long_sums_far_from_the_origin(emulated, randn, channels_last):
    x = randn(5, 4, 40, 41) + 30  # 8,200 positions: many runs and splits, all incomplete
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    shift = x[0].mean((1, 2)).double()
    found = moments(emulated.ops, x, shift)
    check(found, x, shift)
    count = x.numel() // 4
    covariance = found[0] - found[1][:, None] * found[1] / count
    correlation = covariance / covariance.diagonal().sqrt()[:, None] / covariance.diagonal().sqrt()
    expected = torch.corrcoef(x.double().transpose(0, 1).flatten(1))
    torch.testing.assert_close(correlation, expected, rtol=0, atol=1e-7)


def test_batches_add_up(emulated, randn):
    shift = torch.zeros(5, dtype=torch.float64)
    x = randn(4, 5, 6, 6)
    state = moments(emulated.ops, x[:1], shift)
    moments(emulated.ops, x[1:], shift, state)
    check(state, x, shift)


def test_nan_stays_in_its_channel(emulated, randn):
    x = randn(2, 70, 4, 4)
    x[1, 66, 2, 1] = float("nan")
    cross, total, norms = moments(emulated.ops, x, torch.zeros(70, dtype=torch.float64))
    spoiled = torch.zeros(70, dtype=torch.bool)
    spoiled[66] = True
    assert torch.equal(cross.isnan(), spoiled[:, None] | spoiled)
    assert torch.equal(total.isnan(), spoiled)
    assert torch.equal(norms.isnan(), spoiled)


@pytest.mark.parametrize("channels_last", [False, True])
def test_result_does_not_depend_on_the_order_of_threads(emulated, randn, channels_last):
    x = randn(2, 66, 7, 9)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    results = []
    for seed in range(3):
        emulated.seed(seed)
        results.append(moments(emulated.ops, x, randn(66, seed=1).double()))
    assert all(torch.equal(a, b) for one in results[1:] for a, b in zip(one, results[0], strict=True))


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 3, 0)])
def test_empty_batches_change_nothing(emulated, shape):
    state = moments(emulated.ops, torch.empty(shape), torch.zeros(shape[1], dtype=torch.float64))
    assert all(not part.any() for part in state)


def test_wrong_arguments(emulated, randn):
    state = moments(emulated.ops, randn(1, 3, 2, 2), torch.zeros(3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="shift must be a contiguous float64"):
        moments(emulated.ops, randn(1, 3, 2, 2), torch.zeros(3), state)
    with pytest.raises(RuntimeError, match="cross must have the channels of x, 4"):
        moments(emulated.ops, randn(1, 4, 2, 2), torch.zeros(4, dtype=torch.float64), state)


# ------------------------------------------------------------------------------------------------- stacks

STACKS = [(3, 2, 5, 4, 6), (2, 3, 16, 1, 1), (2, 4, 33), (3, 2, 140, 3, 3), (1, 2, 8, 4, 4)]


def stack_layouts(z):
    return [z, z.movedim(2, -1).contiguous().movedim(-1, 2)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", STACKS)
def test_a_stack_has_the_bits_of_its_maps(emulated, randn, shape, dtype):
    shift = randn(shape[0], shape[2], seed=1).double()
    for x in stack_layouts(randn(*shape, dtype=dtype)):
        state = [torch.zeros(s, dtype=torch.float64) for s in ((*shift.shape, shape[2]), shift.shape, shift.shape)]
        emulated.ops.channel_moments_update_(*state, x, shift)
        for g in range(shape[0]):
            alone = [torch.zeros(part.shape[1:], dtype=torch.float64) for part in state]
            emulated.ops.channel_moments_update_(*alone, x[g], shift[g])
            assert all(torch.equal(part[g], one) for part, one in zip(state, alone, strict=True))
