"""The stacked masked convolution as an implicit matrix product, against float64 convolutions of one model at a time."""

import pytest
import torch
from torch.nn import functional

from bdprune.ops import _stacked_conv, masked_conv2d, stacked_conv2d

# Name: (x, weight, stride, padding, dilation, groups). Tiles are 64 rows x 64 columns, 32 deep.
CASES = {
    "3x3": ((2, 3, 7, 6), (5, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "stride 2": ((2, 6, 9, 8), (4, 6, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    "1x1": ((3, 40, 5, 5), (70, 40, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1 stride 2": ((1, 4, 7, 7), (8, 4, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    "groups": ((1, 8, 6, 6), (12, 4, 3, 3), (1, 2), (2, 0), (1, 1), 2),
    "depthwise": ((1, 5, 6, 6), (5, 1, 3, 3), (1, 1), (1, 1), (1, 1), 5),
    "uneven": ((1, 3, 11, 9), (2, 3, 5, 2), (2, 3), (3, 1), (1, 2), 1),
    "more rows than a tile": ((2, 2, 12, 12), (3, 2, 3, 3), (1, 1), (0, 0), (1, 1), 1),
    "linear": ((4, 33, 1, 1), (9, 33, 1, 1), (1, 1), (0, 0), (1, 1), 1),
}
# Share of the sum of magnitudes: a rounding of either operand, and float32 sums.
BOUNDS = {
    (torch.float32, True): 1e-6,
    (torch.float32, False): 2**-10,
    (torch.float16, False): 2**-10,
    (torch.bfloat16, False): 2**-7,
}
MATHS = [pytest.param(*key, id=f"{key[0]}, exact={key[1]}") for key in BOUNDS]
STACK = 2


def numbers(randn, case, dtype):
    x, weight, *settings = CASES[case]
    mask = randn(STACK, weight[0], seed=2)
    mask[0, 0] = 0
    return randn(STACK, *x, dtype=dtype), randn(STACK, *weight, dtype=dtype, seed=1), mask, settings


def convs(x, weight, settings):
    return torch.stack([functional.conv2d(a, b, None, *settings) for a, b in zip(x, weight, strict=True)])


def layouts(x):
    return [x, x.movedim(2, -1).contiguous().movedim(-1, 2)]


def within(found, exact, scale, bound):
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= bound * scale + 1e-30).all()


@pytest.mark.parametrize(("dtype", "exact"), MATHS)
@pytest.mark.parametrize("case", CASES)
def test_forward(emulated, randn, case, dtype, exact):
    x, weight, mask, settings = numbers(randn, case, dtype)
    bias = randn(*mask.shape, seed=3)
    stride, padding, dilation, groups = settings
    z_exact = convs(x.double(), weight.double(), settings) + bias.double()[:, None, :, None, None]
    scale = convs(x.double().abs(), weight.double().abs(), settings) + bias.double().abs()[:, None, :, None, None]
    for own in layouts(x):
        y, z = emulated.ops.stacked_conv2d(own, weight, mask, bias, stride, padding, dilation, groups, True, exact)
        assert y.dtype == z.dtype == dtype
        within(z, z_exact, scale, BOUNDS[dtype, exact])
        assert torch.equal(y, emulated.ops.channel_scale(z, mask))
        only_y, none = emulated.ops.stacked_conv2d(
            own, weight, mask, bias, stride, padding, dilation, groups, False, exact
        )
        assert torch.equal(only_y, y) and none.numel() == 0
        for g in range(STACK):
            one = slice(g, g + 1)
            alone, _ = emulated.ops.stacked_conv2d(
                own[one], weight[one], mask[one], bias[one], stride, padding, dilation, groups, False, exact
            )
            assert torch.equal(y[one], alone)


@pytest.mark.parametrize(("dtype", "exact"), MATHS)
@pytest.mark.parametrize("case", CASES)
def test_input_gradient(emulated, randn, case, dtype, exact):
    x, weight, mask, settings = numbers(randn, case, dtype)
    stride, padding, dilation, groups = settings
    shape = convs(x.double(), weight.double(), settings).shape
    grad = randn(*shape, dtype=dtype, seed=4)

    def gradient(dz, w):
        leaf = torch.zeros(x.shape, dtype=torch.float64).requires_grad_()
        return torch.autograd.grad(convs(leaf, w, settings), leaf, dz)[0]

    dz = grad.double() * mask.double()[:, None, :, None, None]
    expected, scale = gradient(dz, weight.double()), gradient(dz.abs(), weight.double().abs())
    for own in layouts(grad):
        found = emulated.ops.stacked_conv2d_input_grad(
            own, weight, mask, *x.shape[-2:], stride, padding, dilation, groups, exact
        )
        assert found.dtype == dtype
        within(found, expected, scale, 2 * BOUNDS[dtype, exact])


def test_one_batch_for_all_models(emulated, randn):
    x, weight, mask, settings = numbers(randn, "3x3", torch.float32)
    stride, padding, dilation, groups = settings
    rest = (weight, mask, None, stride, padding, dilation, groups, False, True)
    shared, _ = emulated.ops.stacked_conv2d(x[0], *rest)
    own, _ = emulated.ops.stacked_conv2d(x[:1].expand_as(x), *rest)
    assert torch.equal(shared, own)


@pytest.mark.parametrize("case", ["1x1", "groups"])
def test_layout_is_that_of_x(emulated, randn, case):
    x, weight, mask, settings = numbers(randn, case, torch.float32)
    stride, padding, dilation, groups = settings
    for own, fastest in zip(layouts(x), (False, True), strict=True):
        y, _ = emulated.ops.stacked_conv2d(own, weight, mask, None, stride, padding, dilation, groups, False, True)
        assert (y.stride(2) == 1) == fastest


def test_masked_tiles_are_not_computed(emulated, randn):
    x, weight = randn(2, 1, 3, 4, 4), randn(2, 130, 3, 3, 3, seed=1)
    weight[:, 64:128] = float("nan")
    mask = torch.ones(2, 130)
    mask[:, 64:128] = 0  # the second tile of columns, whole
    rest = ((1, 1), (1, 1), (1, 1), 1)
    y, _ = emulated.ops.stacked_conv2d(x, weight, mask, None, *rest, False, True)
    assert (y[:, :, 64:128] == 0).all() and y.isfinite().all()
    _, z = emulated.ops.stacked_conv2d(x, weight, mask, None, *rest, True, True)
    assert z[:, :, 64:128].isnan().all()
    found = emulated.ops.stacked_conv2d_input_grad(torch.ones_like(y), weight, mask, 4, 4, *rest, True)
    assert found.isfinite().all()


@pytest.mark.parametrize("exact", [True, False])
def test_result_does_not_depend_on_the_order_of_threads(emulated, randn, exact):
    x, weight, mask, settings = numbers(randn, "more rows than a tile", torch.float32)
    stride, padding, dilation, groups = settings
    results = []
    for seed in range(3):
        emulated.seed(seed)
        y, z = emulated.ops.stacked_conv2d(x, weight, mask, None, stride, padding, dilation, groups, True, exact)
        grad = emulated.ops.stacked_conv2d_input_grad(
            y, weight, mask, *x.shape[-2:], stride, padding, dilation, groups, exact
        )
        results.append((y, z, grad))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_empty_batches(emulated):
    weight, mask = torch.ones(2, 4, 3, 3, 3), torch.ones(2, 4)
    rest = ((1, 1), (1, 1), (1, 1), 1)
    y, z = emulated.ops.stacked_conv2d(torch.ones(2, 0, 3, 5, 5), weight, mask, None, *rest, True, False)
    assert y.shape == z.shape == (2, 0, 4, 5, 5)
    assert emulated.ops.stacked_conv2d_input_grad(y, weight, mask, 5, 5, *rest, False).shape == (2, 0, 3, 5, 5)


def test_wrong_arguments(emulated):
    x, weight, mask = torch.ones(2, 1, 3, 5, 5), torch.ones(2, 4, 3, 3, 3), torch.ones(2, 4)

    def run(x=x, weight=weight, mask=mask, stride=(1, 1), groups=1, bias=None):
        return emulated.ops.stacked_conv2d(x, weight, mask, bias, stride, (0, 0), (1, 1), groups, False, True)

    for words, wrong in {
        "does not fit a weight": {"x": torch.ones(3, 1, 3, 5, 5)},
        "mask must be contiguous float32": {"mask": torch.ones(4)},
        "same dtype": {"x": x.half()},
        "larger than the padded input": {"x": torch.ones(2, 1, 3, 2, 2)},
        "stride and dilation must be positive": {"stride": (0, 1)},
        "groups must divide": {"groups": 3},
        "bias must be": {"bias": torch.ones(4)},
        "float16, bfloat16 or float32": {"x": x.double(), "weight": weight.double()},
    }.items():
        with pytest.raises(RuntimeError, match=words):
            run(**wrong)


@pytest.fixture
def on_kernels(emulated, monkeypatch):
    """The public functions on the emulated kernels, as on a GPU."""
    monkeypatch.setattr(_stacked_conv, "_ops", emulated.ops)
    monkeypatch.setattr(_stacked_conv, "takes", lambda x, weight: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("shared", [False, True], ids=["own_batches", "one_batch"])
@pytest.mark.parametrize("case", ["3x3", "stride 2", "groups"])
def test_autograd_is_that_of_the_composition(on_kernels, monkeypatch, randn, case, shared):
    x, weight, mask, settings = numbers(randn, case, torch.float32)
    leaves = [x[0] if shared else x, weight, mask, randn(*mask.shape, seed=3)]

    def gradients():
        own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        y = masked_conv2d(*own, *settings)
        plain = stacked_conv2d(own[0], own[1], own[3], *settings)
        total = (y * randn(*y.shape, seed=5)).sum() + plain.square().sum()
        return [y.detach(), plain.detach(), *torch.autograd.grad(total, own)]

    found = gradients()
    monkeypatch.setattr(_stacked_conv, "takes", lambda x, weight: False)
    for mine, theirs in zip(found, gradients(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_same_padding_goes_to_the_kernels_where_it_is_even(on_kernels, randn):
    x, weight, mask = randn(2, 1, 3, 6, 6), randn(2, 4, 3, 3, 3, seed=1), torch.ones(2, 4)
    expected = convs(x, weight, ((1, 1), "same"))
    torch.testing.assert_close(masked_conv2d(x, weight, mask, padding="same"), expected, rtol=1e-4, atol=1e-5)
    assert _stacked_conv.setting_of(weight[..., :2], 1, "same", 1, 1) is None
    assert _stacked_conv.setting_of(weight, 2, "same", 1, 1) is None  # PyTorch refuses it, in its own words
    assert _stacked_conv.setting_of(weight, 2, "valid", 1, 1) == ((2, 2), (0, 0), (1, 1), 1)


def test_autocast_casts_as_a_convolution_would(on_kernels, randn):
    x, weight, mask, settings = numbers(randn, "3x3", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_conv2d(x, weight.requires_grad_(), mask, None, *settings)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("shared", [False, True], ids=["own_batches", "one_batch"])
def test_fake_kernels_say_what_the_kernels_give(emulated, randn, shared):
    x, weight, mask, settings = numbers(randn, "stride 2", torch.float32)
    for own in layouts(x):
        own = own[0] if shared else own
        rest = (weight, mask, None, *settings, True, True)
        for real, fake in zip(emulated.ops.stacked_conv2d(own, *rest), _stacked_conv._fake(own, *rest), strict=True):
            assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
        grad = emulated.ops.stacked_conv2d(own, *rest)[0]
        rest = (grad, weight, mask, *x.shape[-2:], *settings, True)
        real, fake = emulated.ops.stacked_conv2d_input_grad(*rest), _stacked_conv._fake_input_grad(*rest)
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
