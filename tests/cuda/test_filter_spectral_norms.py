import pytest
import torch

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# By size class: vectors (1x1, depthwise, linear), up to 9 on a side (the short side being the window or the channels),
# up to 49, and beyond.
SHAPES = [
    (5, 40, 1, 1), (6, 1, 3, 3), (7, 33), (3, 1, 7, 7), (1, 1, 1, 1), (2, 1),
    (5, 64, 3, 3), (4, 3, 3, 3), (2, 3, 7, 7), (3, 2, 3, 3), (3, 9, 3, 3), (2, 8, 5, 5), (2, 33, 2, 2), (2, 3, 9, 3, 3),
    (2, 30, 5, 5), (1, 11, 4, 4), (1, 52, 7, 7),
    (1, 60, 8, 8),
]  # fmt: skip


def norms(ops, weights, scales=None):
    return ops.filter_spectral_norms(weights, scales or [None] * len(weights))


def exact(weight):
    window = 1 if weight.dim() == 2 else weight.shape[-2] * weight.shape[-1]
    channels = weight.shape[1] if weight.dim() == 2 else weight.shape[-3]
    return torch.linalg.svdvals(weight.double().reshape(-1, channels, window)).amax(-1)


def tolerance(dtype):
    return {"rtol": 1e-13 if dtype == torch.float64 else 1.2e-7, "atol": 0}  # float32 rounding of the result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_largest_singular_value(emulated, randn, shape, dtype):
    weight = randn(*shape, dtype=dtype)
    found = norms(emulated.ops, [weight])
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), exact(weight), **tolerance(dtype))


def test_one_call_for_weights_of_all_shapes_and_dtypes(emulated, randn):
    weights = [randn(*shape, dtype=DTYPES[i % 3], seed=i) for i, shape in enumerate(SHAPES * 2)]
    scales = [randn(*weight.shape[: weight.dim() - 3 if weight.dim() > 2 else 1], dtype=DTYPES[i % 4], seed=i + 100)
              if i % 3 else None for i, weight in enumerate(weights)]  # fmt: skip
    expected = [
        exact(w) * (1 if s is None else s.double().abs().flatten()) for w, s in zip(weights, scales, strict=True)
    ]
    torch.testing.assert_close(norms(emulated.ops, weights, scales).double(), torch.cat(expected), **tolerance(None))


def test_one_launch_computes_all_and_filters_keep_their_bits(emulated, randn):
    weights = [randn(*shape, dtype=DTYPES[i % 4], seed=i) for i, shape in enumerate(SHAPES)]
    before = emulated.launches and emulated.launches()
    joint = norms(emulated.ops, weights)
    assert before is None or emulated.launches() == before + 1
    alone = [norms(emulated.ops, [weight]) for weight in weights]
    for mine, one in zip(joint.split([len(one) for one in alone]), alone, strict=True):
        assert torch.equal(mine.to(one.dtype), one)  # a list with one float64 weight is float64


def test_strided_weights(emulated, randn):
    views = [
        randn(3, 16, 3, 3).contiguous(memory_format=torch.channels_last),
        randn(2, 12, 5, 5).contiguous(memory_format=torch.channels_last),
        randn(3, 32, 3, 3)[:, ::2],
        randn(6, 20, 3, 5).transpose(2, 3)[::2],
        randn(20, 6).T,
    ]
    expected = torch.cat([exact(view) for view in views])
    torch.testing.assert_close(norms(emulated.ops, views).double(), expected, **tolerance(None))
    scale = randn(6)[::2]
    found = norms(emulated.ops, views[:1], [scale])
    torch.testing.assert_close(found.double(), exact(views[0]) * scale.double().abs(), **tolerance(None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(3, 8, 1, 1), (6, 40, 3, 3), (3, 12, 4, 4)])
def test_a_non_finite_value_affects_only_its_filter(emulated, randn, shape, bad):
    weight = randn(*shape)
    weight[1, 2, -1, 0] = bad
    found = norms(emulated.ops, [weight])
    assert found[1].isnan()
    keep = torch.arange(shape[0]) != 1
    torch.testing.assert_close(found[keep].double(), exact(weight[keep]), **tolerance(None))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e30), (torch.float32, 1e-30), (torch.float64, 1e250),
                                             (torch.float64, 1e-250), (torch.float64, 1e-310)])  # fmt: skip
@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (2, 20, 3, 3), (1, 12, 4, 4)])
def test_range(emulated, randn, shape, dtype, size):
    weight = randn(*shape, dtype=dtype)
    found = norms(emulated.ops, [weight * size]) / size
    torch.testing.assert_close(found.double(), exact(weight), rtol=1e-6, atol=0)


def test_zero_and_repeated_singular_values(emulated):
    equal = torch.eye(9).view(1, 9, 3, 3) * 3
    one = torch.ones(1, 64, 3, 3)
    found = norms(emulated.ops, [torch.zeros(2, 16, 3, 3), equal, one, torch.zeros(1, 10, 4, 4), torch.zeros(1, 4)])
    torch.testing.assert_close(found, torch.tensor([0, 0, 3, 24, 0, 0]).float(), rtol=1e-7, atol=0)


def test_empty(emulated):
    assert norms(emulated.ops, [torch.empty(0, 4, 3, 3)]).shape == (0,)
    assert torch.equal(norms(emulated.ops, [torch.empty(2, 0, 3, 3), torch.ones(1, 4)]), torch.tensor([0.0, 0.0, 2.0]))


def test_result_does_not_depend_on_the_order_of_threads(emulated, randn):
    # In float64, the last bits show a rotation computed from a half-updated matrix.
    shapes = ((3, 40, 1, 1), (6, 70, 3, 3), (2, 12, 4, 4), (1, 50, 5, 10))
    weights = [randn(*shape, dtype=torch.float64) for shape in shapes]
    results = []
    for seed in range(4):
        emulated.seed(seed)
        results.append(norms(emulated.ops, weights))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_wrong_arguments(emulated, randn):
    with pytest.raises(RuntimeError, match="got 3 dimensions"):
        norms(emulated.ops, [randn(2, 3, 3)])
    with pytest.raises(RuntimeError, match="like the filters"):
        norms(emulated.ops, [randn(2, 3)], [torch.ones(3)])
    with pytest.raises(RuntimeError, match="float16, bfloat16, float32 or float64"):
        norms(emulated.ops, [torch.ones(2, 3, dtype=torch.int32)])
