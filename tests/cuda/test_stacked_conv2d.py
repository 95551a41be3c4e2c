"""The stacked masked convolution as an implicit matrix product, compared with float64 convolutions per model."""

import sys

import pytest
import torch
from torch.nn import functional

from bdprune.ops import masked_conv2d, stacked_conv2d

FACE = sys.modules["bdprune.ops.stacked_conv2d"]

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
# Bounds as a share of the sum of magnitudes: one rounding of each operand, and float32 sums.
BOUNDS = {
    (torch.float32, True): 1e-6,
    (torch.float32, False): 2**-10,
    (torch.float16, False): 2**-10,
    (torch.bfloat16, False): 2**-7,
}
MATHS = [pytest.param(*key, id=f"{key[0]}, exact={key[1]}") for key in BOUNDS]
STACK = 2


def geometry(settings):
    return dict(zip(("stride", "padding", "dilation", "groups"), settings, strict=True))


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
    shape = convs(x.double(), weight.double(), settings).shape
    grad = randn(*shape, dtype=dtype, seed=4)

    def gradient(dz, w):
        leaf = torch.zeros(x.shape, dtype=torch.float64).requires_grad_()
        return torch.autograd.grad(convs(leaf, w, settings), leaf, dz)[0]

    dz = grad.double() * mask.double()[:, None, :, None, None]
    expected, scale = gradient(dz, weight.double()), gradient(dz.abs(), weight.double().abs())
    rest = (weight, mask, *x.shape[-2:], *settings, exact)
    for own in layouts(grad):
        found, none = emulated.ops.stacked_conv2d_backward(own, None, *rest)
        assert found.dtype == dtype and none.numel() == 0
        within(found, expected, scale, 2 * BOUNDS[dtype, exact])


@pytest.mark.parametrize(("dtype", "exact"), MATHS[1:3])
@pytest.mark.parametrize("case", CASES)
def test_the_mask_gradient_comes_with_the_input_gradient(emulated, randn, case, dtype, exact):
    x, weight, mask, settings = numbers(randn, case, dtype)
    rest = (*x.shape[-2:], *settings, exact)
    shape = convs(x.double(), weight.double(), settings).shape
    grad, z = randn(*shape, dtype=dtype, seed=4), randn(*shape, dtype=dtype, seed=5)
    products = grad.double() * z.double()
    mask[1] = 0  # the products are all zero, but the mask still has a gradient
    for own_grad, own_z in zip(layouts(grad) * 2, layouts(z) + layouts(z)[::-1], strict=True):
        before = emulated.launches and emulated.launches()
        found, grad_mask = emulated.ops.stacked_conv2d_backward(own_grad, own_z, weight, mask, *rest)
        assert before is None or emulated.launches() == before + 2  # the product, and the merge of a few partial sums
        assert grad_mask.dtype == torch.float32
        within(grad_mask, products.sum((1, 3, 4)), products.abs().sum((1, 3, 4)), 2**-23)
        assert torch.equal(found, emulated.ops.stacked_conv2d_backward(own_grad, None, weight, mask, *rest)[0])
        for g in range(STACK):
            one = slice(g, g + 1)
            alone = emulated.ops.stacked_conv2d_backward(own_grad[one], own_z[one], weight[one], mask[one], *rest)
            assert torch.equal(found[one], alone[0]) and torch.equal(grad_mask[one], alone[1])


@pytest.mark.parametrize("fastest", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("case", [((3, 4, 9, 9), (70, 4, 3, 3), 2, 1), ((1, 130, 3, 3), (6, 130, 1, 1), 1, 9)], ids=str)
def test_mask_gradient_where_the_maps_differ_in_size(emulated, randn, case, fastest):
    # With a stride, some row tiles get no share. With much padding, a share has more rows than its tile. Two or three
    # column tiles share the channels.
    x, weight, stride, padding = case
    mask, weight = randn(1, weight[0]), randn(1, *weight, seed=1)
    size = [(x[2] + 2 * padding - weight.shape[3]) // stride + 1] * 2
    grad, z = (layouts(randn(1, x[0], weight.shape[1], *size, seed=seed))[fastest] for seed in (2, 3))
    rest = (*x[2:], (stride, stride), (padding, padding), (1, 1), 1, True)
    _, found = emulated.ops.stacked_conv2d_backward(grad, z, weight, mask, *rest)
    products = grad.double() * z.double()
    within(found, products.sum((1, 3, 4)), products.abs().sum((1, 3, 4)), 2**-23)


@pytest.mark.parametrize(("dtype", "exact"), MATHS[1:3])
@pytest.mark.parametrize("channels", [24, 36])
def test_weights_are_read_in_any_layout(emulated, randn, dtype, exact, channels):
    # 24 channels are whole vectors of either dtype, 36 of float32 only.
    x, mask = layouts(randn(2, 2, channels, 5, 4, dtype=dtype)), randn(2, 40, seed=2)
    plain = randn(2, 40, channels, 3, 2, dtype=dtype, seed=1)
    gaps = randn(2, 40, channels, 3, 4, dtype=dtype)
    gaps[..., ::2] = plain
    turned = plain.transpose(1, 2).contiguous().transpose(1, 2)
    rest = ((1, 1), (1, 1), (1, 1), 1)
    results = []
    for weight in (plain, layouts(plain)[1], gaps[..., ::2], turned):
        for own in x:
            y, _ = emulated.ops.stacked_conv2d(own, weight, mask, None, *rest, False, exact)
            results.append((y, emulated.ops.stacked_conv2d_backward(y, None, weight, mask, 5, 4, *rest, exact)[0]))
    for y, grad_x in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(grad_x, results[0][1])


@pytest.mark.parametrize("offset", [1, 4])
def test_maps_without_vector_alignment(emulated, randn, offset):
    memory = randn(2 * 2 * 8 * 20 + offset)[offset:]
    x = memory.view(2, 2, 5, 4, 8).movedim(-1, 2)  # channels_last, in memory that may begin between two vectors
    weight, mask, rest = randn(2, 8, 8, 3, 3, seed=1), randn(2, 8, seed=2), ((1, 1), (1, 1), (1, 1), 1)
    y, _ = emulated.ops.stacked_conv2d(x, weight, mask, None, *rest, False, True)
    assert torch.equal(y, emulated.ops.stacked_conv2d(x.contiguous(), weight, mask, None, *rest, False, True)[0])


@pytest.mark.parametrize("case", ["3x3", "groups"])
def test_one_weight_for_all_masks(emulated, randn, case):
    x, weight, mask, settings = numbers(randn, case, torch.float32)
    one = layouts(weight)[1][:1]
    copies = one.contiguous().expand_as(weight).contiguous()
    results = []
    for own in (one, one.expand_as(weight), copies):
        y, z = emulated.ops.stacked_conv2d(x, own, mask, None, *settings, True, False)
        results.append((y, z, *emulated.ops.stacked_conv2d_backward(y, z, own, mask, *x.shape[-2:], *settings, False)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_one_batch_for_all_models(emulated, randn):
    x, weight, mask, settings = numbers(randn, "3x3", torch.float32)
    stride, padding, dilation, groups = settings
    rest = (weight, mask, None, stride, padding, dilation, groups, False, True)
    shared, _ = emulated.ops.stacked_conv2d(x[0], *rest)
    own, _ = emulated.ops.stacked_conv2d(x[:1].expand_as(x), *rest)
    assert torch.equal(shared, own)


@pytest.mark.parametrize("case", ["1x1", "groups"])
def test_the_output_has_the_layout_of_x(emulated, randn, case):
    x, weight, mask, settings = numbers(randn, case, torch.float32)
    stride, padding, dilation, groups = settings
    for own, fastest in zip(layouts(x), (False, True), strict=True):
        y, _ = emulated.ops.stacked_conv2d(own, weight, mask, None, stride, padding, dilation, groups, False, True)
        assert (y.stride(2) == 1) == fastest


def test_masked_tiles_are_not_computed(emulated, randn):
    x, weight = randn(2, 1, 3, 4, 4), randn(2, 130, 3, 3, 3, seed=1)
    weight[:, 64:128] = float("nan")
    mask = torch.ones(2, 130)
    mask[:, 64:128] = 0  # the whole second tile of columns
    rest = ((1, 1), (1, 1), (1, 1), 1)
    y, _ = emulated.ops.stacked_conv2d(x, weight, mask, None, *rest, False, True)
    assert (y[:, :, 64:128] == 0).all() and y.isfinite().all()
    _, z = emulated.ops.stacked_conv2d(x, weight, mask, None, *rest, True, True)
    assert z[:, :, 64:128].isnan().all()
    found, _ = emulated.ops.stacked_conv2d_backward(torch.ones_like(y), None, weight, mask, 4, 4, *rest, True)
    assert found.isfinite().all()
    weight[:, 64:128] = 0  # skipped chunks add nothing, and no other chunk is skipped
    plain, _ = emulated.ops.stacked_conv2d_backward(
        torch.ones_like(y), None, weight, torch.ones_like(mask), 4, 4, *rest, True
    )
    assert torch.equal(found, plain)


@pytest.mark.parametrize("exact", [True, False])
def test_result_does_not_depend_on_the_order_of_threads(emulated, randn, exact):
    x, weight, mask, settings = numbers(randn, "more rows than a tile", torch.float32)
    stride, padding, dilation, groups = settings
    results = []
    for seed in range(3):
        emulated.seed(seed)
        y, z = emulated.ops.stacked_conv2d(x, weight, mask, None, stride, padding, dilation, groups, True, exact)
        size = x.shape[-2:]
        grads = emulated.ops.stacked_conv2d_backward(
            y, z, weight, mask, *size, stride, padding, dilation, groups, exact
        )
        results.append((y, z, *grads))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_empty_batches(emulated):
    weight, mask = torch.ones(2, 4, 3, 3, 3), torch.ones(2, 4)
    rest = ((1, 1), (1, 1), (1, 1), 1)
    y, z = emulated.ops.stacked_conv2d(torch.ones(2, 0, 3, 5, 5), weight, mask, None, *rest, True, False)
    assert y.shape == z.shape == (2, 0, 4, 5, 5)
    grad_x, grad_mask = emulated.ops.stacked_conv2d_backward(y, z, weight, mask, 5, 5, *rest, False)
    assert grad_x.shape == (2, 0, 3, 5, 5) and torch.equal(grad_mask, torch.zeros(2, 4))


def test_wrong_arguments(emulated):
    x, weight, mask = torch.ones(2, 1, 3, 5, 5), torch.ones(2, 4, 3, 3, 3), torch.ones(2, 4)

    def run(x=x, weight=weight, mask=mask, stride=(1, 1), groups=1, bias=None):
        return emulated.ops.stacked_conv2d(x, weight, mask, bias, stride, (0, 0), (1, 1), groups, False, True)

    for words, wrong in {
        "does not match a weight": {"x": torch.ones(3, 1, 3, 5, 5)},
        "for one model or for 3, got 2": {"mask": torch.ones(3, 4)},
        "must be below 2\\^30": {"stride": (1 << 30, 1)},
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
    monkeypatch.setattr(FACE, "_ops", emulated.ops)
    monkeypatch.setattr(FACE, "takes", lambda x: True)
    monkeypatch.setenv("BDPRUNE_TUNE", "conv=kernel")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("shared", [False, True], ids=["own_batches", "one_batch"])
@pytest.mark.parametrize("case", ["3x3", "stride 2", "groups"])
def test_autograd_equals_the_composition(on_kernels, monkeypatch, randn, case, shared):
    x, weight, mask, settings = numbers(randn, case, torch.float32)
    leaves = [x[0] if shared else x, weight, mask, randn(*mask.shape, seed=3)]

    def gradients():
        own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        y = masked_conv2d(*own, **geometry(settings))
        plain = stacked_conv2d(own[0], own[1], own[3], *settings)
        total = (y * randn(*y.shape, seed=5)).sum() + plain.square().sum()
        return [y.detach(), plain.detach(), *torch.autograd.grad(total, own)]

    found = gradients()
    monkeypatch.setattr(FACE, "takes", lambda x: False)
    for mine, theirs in zip(found, gradients(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [False, True], ids=["learning", "frozen"])
@pytest.mark.parametrize("stack", [None, 3])
@pytest.mark.parametrize("case", ["3x3", "groups"])
def test_autograd_of_one_weight_equals_the_composition(on_kernels, monkeypatch, randn, case, stack, frozen):
    x, weight, _, settings = numbers(randn, case, torch.float32)
    leading = () if stack is None else (stack,)
    x, mask, bias = randn(*leading, *x.shape[1:]), randn(*leading, weight.shape[1], seed=2), randn(weight.shape[1])

    def gradients():
        own = [leaf.detach().clone() for leaf in (x, weight[0], mask, bias)]
        wanted = [leaf.requires_grad_() for leaf in (own[::2] if frozen else own)]
        y = masked_conv2d(*own, **geometry(settings))
        return [y.detach(), *torch.autograd.grad((y * randn(*y.shape, seed=5)).sum(), wanted)]

    found = gradients()
    monkeypatch.setattr(FACE, "takes", lambda x: False)
    for mine, theirs in zip(found, gradients(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_the_mask_has_a_gradient_without_the_input(on_kernels, monkeypatch, randn):
    x, weight, mask, settings = numbers(randn, "3x3", torch.float32)
    own = mask.clone().requires_grad_()
    y = masked_conv2d(x, weight, own, None, **geometry(settings))
    (found,) = torch.autograd.grad(y.square().sum(), own)
    z = convs(x.double(), weight.double(), settings)
    torch.testing.assert_close(
        found.double(), (2 * z.square() * mask.double()[..., None, None].unsqueeze(1)).sum((1, 3, 4))
    )


def test_same_padding_uses_the_kernels_if_it_is_even(on_kernels, randn):
    x, weight, mask = randn(2, 1, 3, 6, 6), randn(2, 4, 3, 3, 3, seed=1), torch.ones(2, 4)
    expected = convs(x, weight, ((1, 1), "same"))
    torch.testing.assert_close(masked_conv2d(x, weight, mask, padding="same"), expected, rtol=1e-4, atol=1e-5)
    assert FACE.setting_of(weight[..., :2], 1, "same", 1, 1) is None
    assert FACE.setting_of(weight, 2, "same", 1, 1) is None  # PyTorch raises its own error
    assert FACE.setting_of(weight, 2, "valid", 1, 1) == ((2, 2), (0, 0), (1, 1), 1)


def test_autocast_casts_as_a_convolution_would(on_kernels, randn):
    x, weight, mask, settings = numbers(randn, "3x3", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_conv2d(x, weight.requires_grad_(), mask, None, **geometry(settings))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("shared", [False, True], ids=["own_batches", "one_batch_and_weight"])
def test_fake_kernels_give_the_shapes_of_the_kernels(emulated, randn, shared):
    x, weight, mask, settings = numbers(randn, "stride 2", torch.float32)
    for own in layouts(x):
        own, weight = (own[0], weight[:1]) if shared else (own, weight)
        rest = (weight, mask, None, *settings, True, True)
        for real, fake in zip(emulated.ops.stacked_conv2d(own, *rest), FACE._fake(own, *rest), strict=True):
            assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
        grad = emulated.ops.stacked_conv2d(own, *rest)[0]
        for z in (None, grad, layouts(grad.contiguous())[1]):
            rest = (grad, z, weight, mask, *x.shape[-2:], *settings, True)
            both = zip(emulated.ops.stacked_conv2d_backward(*rest), FACE._fake_backward(*rest), strict=True)
            for real, fake in both:
                assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.parametrize("fastest", [False, True], ids=["nchw", "channels_last"])
def test_opcheck(emulated, randn, fastest):
    on_gpu = emulated.launches is None
    name, device = ("bdprune", "cuda") if on_gpu else ("bdprune_simt", "cpu")
    x, weight, mask, settings = numbers(randn, "stride 2", torch.float32)
    x, weight, mask = layouts(x)[fastest].to(device), weight.to(device), mask.to(device)
    ops = getattr(torch.ops, name)
    with torch.library._scoped_library(name, "FRAGMENT") as library:
        if not on_gpu:
            torch.library.register_fake(f"{name}::stacked_conv2d", FACE._fake, lib=library)
            torch.library.register_fake(f"{name}::stacked_conv2d_backward", FACE._fake_backward, lib=library)
        for own_weight in (weight, weight[:1].expand_as(weight)):
            torch.library.opcheck(ops.stacked_conv2d.default, (x, own_weight, mask, None, *settings, True, True))
            y, z = ops.stacked_conv2d(x, own_weight, mask, None, *settings, True, True)
            for known in (None, z):
                rest = (own_weight, mask, *x.shape[-2:], *settings, True)
                torch.library.opcheck(ops.stacked_conv2d_backward.default, (y, known, *rest))
