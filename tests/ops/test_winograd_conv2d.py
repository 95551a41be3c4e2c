"""winograd_conv2d: values and gradients compared with float64, and with the errors of plain float32 convolution."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bdprune.ops import _backend, winograd_conv2d, winograd_is_faster

from .helpers import DTYPES, layouts, native, random, threads

# Winograd sums larger numbers than the direct convolution. Its errors are up to 2.8 times as large in the mean and 2.7
# times at the maximum on one thread; on two, where the direct convolution splits its sums, 4.2 times in the mean.
MEAN, MAX = 5.0, 6.0
# In roundings of the sum of the magnitudes of the products: few products have almost no error in a direct convolution.
BOUND = 32.0

SHAPES = [(2, 3, 5, 8, 8), (1, 1, 1, 1, 1), (3, 8, 16, 4, 4), (2, 17, 33, 7, 5), (1, 64, 20, 13, 2), (65, 5, 3, 3, 9)]
"""N, I, O, H, W: whole and partial tiles, whole and partial registers, more tiles than a chunk."""


def tensors(shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, weight, bias and the gradient of the output."""
    n, i, o, h, w = shape
    sizes = [(n, i, h, w), (o, i, 3, 3), (o,), (n, o, h, w)]
    x, weight, bias, grad = (random(size, dtype, seed=seed) for seed, size in enumerate(sizes))
    return x, weight / (3 * i**0.5), bias, grad


def forward_and_backward(
    function: object, x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor
) -> list[Tensor]:
    """Output and gradients."""
    inputs = [value.detach().requires_grad_() for value in (x, weight, bias) if value is not None]
    out = function(*inputs)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def magnitudes(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    """The scale of the rounding errors of output and gradients."""
    return forward_and_backward(
        plain, *(None if one is None else one.double().abs() for one in (x, weight, bias, grad))
    )


def assert_near(ours: list[Tensor], exact: list[Tensor], sizes: list[Tensor]) -> None:
    for mine, truth, size in zip(ours, exact, sizes, strict=True):
        assert mine.shape == truth.shape and mine.dtype == torch.float32
        assert (mine.double() - truth).abs().max() <= BOUND * 2**-24 * size.max()


@pytest.mark.parametrize("channels, size", [(32, 32), (64, 16), (128, 8), (256, 4)])
def test_the_error_is_a_few_times_the_error_of_a_direct_convolution(channels: int, size: int) -> None:
    x, weight, _, grad = (channels_last(one) for one in tensors((16, channels, channels, size, size)))
    given = x.relu(), weight, None, grad
    exact = forward_and_backward(plain, *(None if one is None else one.double() for one in given))
    for mine, direct, truth in zip(
        forward_and_backward(winograd_conv2d, *given), forward_and_backward(plain, *given), exact, strict=True
    ):
        error, usual = mine.double() - truth, direct.double() - truth
        assert error.square().mean() <= MEAN**2 * usual.square().mean()
        assert error.abs().max() <= MAX * usual.abs().max()


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_layout(shape: tuple[int, int, int, int, int], with_bias: bool) -> None:
    x, weight, bias, grad = tensors(shape)
    offset = bias if with_bias else None
    exact = forward_and_backward(plain, *(None if one is None else one.double() for one in (x, weight, offset, grad)))
    sizes = magnitudes(x, weight, offset, grad)
    for other_x in layouts(x):
        assert_near(forward_and_backward(winograd_conv2d, other_x, weight, offset, grad), exact, sizes)
    for other_weight, other_grad in zip(layouts(weight), layouts(grad), strict=True):
        assert_near(forward_and_backward(winograd_conv2d, x, other_weight, offset, other_grad), exact, sizes)


@settings(max_examples=50, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40), st.integers(1, 18), st.integers(1, 18)),
    st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_any_shape_and_scale(shape: tuple[int, int, int, int, int], scale: float) -> None:
    x, weight, bias, grad = tensors(shape)
    given = (x * scale, weight, bias * scale, grad)
    exact = forward_and_backward(plain, *(one.double() for one in given))
    assert_near(forward_and_backward(winograd_conv2d, *given), exact, magnitudes(*given))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
@native
def test_every_instruction_set(isa: str) -> None:
    """The chosen instruction set is read once per process."""
    if _backend.build_info()["cpu_features"] == isa:
        pytest.skip("all other tests run on it")
    tests = [f"{__file__}::{test.__name__}" for test in (test_any_shape_and_scale, test_same_bits_with_any_threads)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env={**os.environ, "BDPRUNE_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_an_impulse_reproduces_the_filter() -> None:
    x = torch.zeros(1, 1, 6, 6)
    x[0, 0, 2, 3] = 1.0
    weight = torch.arange(9.0).view(1, 1, 3, 3)
    out = winograd_conv2d(x, weight)
    assert torch.allclose(out[0, 0, 1:4, 2:5], weight[0, 0].flip(0, 1), atol=1e-5)
    assert out.sum().item() == pytest.approx(36.0, abs=1e-4)


def test_only_needed_gradients_are_computed() -> None:
    x, weight, bias, grad = tensors(SHAPES[0])
    full = forward_and_backward(winograd_conv2d, x, weight, bias, grad)
    for index, name in enumerate(("x", "weight", "bias")):
        inputs = {"x": x, "weight": weight, "bias": bias}
        inputs[name] = inputs[name].clone().requires_grad_()
        (alone,) = torch.autograd.grad(winograd_conv2d(**inputs), inputs[name], grad)
        assert torch.equal(alone, full[1 + index])


def test_same_bits_with_any_threads() -> None:
    x, weight, bias, grad = tensors((13, 24, 40, 17, 9))
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(forward_and_backward(winograd_conv2d, x, weight, bias, grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("channels", [8, 704], ids=["kept_memory", "memory_of_its_own"])
def test_any_number_of_filters_works(channels: int) -> None:
    x, weight, _, grad = tensors((2, channels, channels, 5, 3))
    exact = forward_and_backward(plain, x.double(), weight.double(), None, grad.double())
    assert_near(forward_and_backward(winograd_conv2d, x, weight, None, grad), exact, magnitudes(x, weight, None, grad))


def test_concurrent_calls_do_not_affect_each_other() -> None:
    problems = [tensors((3, 8 * channels, 40 - channels, 9, 9)) for channels in range(1, 9)]
    expected = [forward_and_backward(winograd_conv2d, *one) for one in problems]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: forward_and_backward(winograd_conv2d, *one), problems * 4))
    for mine, alone in zip(found, expected * 4, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, alone, strict=True))


@pytest.mark.skipif(not _backend.HAS_OPS, reason="PyTorch's convolution does not guarantee this")
def test_the_bits_of_an_image_do_not_depend_on_its_batch() -> None:
    x, weight, bias, _ = tensors((30, 6, 9, 10, 10))
    whole = winograd_conv2d(x, weight, bias)
    assert all(torch.equal(winograd_conv2d(one[None], weight, bias)[0], out) for one, out in zip(x, whole, strict=True))


def test_empty_batch() -> None:
    x, weight, bias, grad = tensors((0, 4, 6, 5, 5))
    out, grad_x, grad_weight, grad_bias = forward_and_backward(winograd_conv2d, x, weight, bias, grad)
    assert out.shape == (0, 6, 5, 5) and grad_x.shape == x.shape
    assert not grad_weight.any() and not grad_bias.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_value_affects_only_its_tiles(value: float) -> None:
    x, weight, _, _ = tensors((2, 3, 4, 12, 12))
    out = winograd_conv2d(x, weight)
    x[0, 1, 5, 6] = value  # read by the tile of rows and columns 4 to 7 only
    spoilt = winograd_conv2d(x, weight)
    assert not spoilt[0, :, 4:7, 5:8].isfinite().any()
    spoilt[0, :, 4:8, 4:8] = out[0, :, 4:8, 4:8]
    assert torch.equal(spoilt, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_dtypes_use_plain_convolutions(dtype: torch.dtype) -> None:
    x, weight, bias, _ = (one.to(dtype) for one in tensors(SHAPES[0]))
    ours = winograd_conv2d(x, weight, bias)
    assert ours.dtype == dtype
    assert torch.equal(ours, plain(x, weight, bias)) == (dtype != torch.float32 or not _backend.HAS_OPS)


def test_arguments_that_do_not_fit_are_errors() -> None:
    x, weight, bias, _ = tensors(SHAPES[0])
    with pytest.raises(TypeError, match="list"):
        winograd_conv2d([x], weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x must be \[N, I, H, W\]"):
        winograd_conv2d(x[0], weight)
    with pytest.raises(ValueError, match="at least one"):
        winograd_conv2d(x[..., :0], weight)
    for wrong in (weight[:, :2], weight[..., :2], weight[0], weight[:0]):
        with pytest.raises(ValueError, match=r"weight must be \[O, 3, 3, 3\]"):
            winograd_conv2d(x, wrong)
    with pytest.raises(ValueError, match=r"bias must be \[5\]"):
        winograd_conv2d(x, weight, bias[:3])
    with pytest.raises(ValueError, match="float64"):
        winograd_conv2d(x, weight.double())


@native
@pytest.mark.parametrize("fastest", [False, True], ids=["nchw", "channels_last"])
def test_opcheck(fastest: bool) -> None:
    x, weight, bias, grad = tensors(SHAPES[0])
    if fastest:
        x, weight, grad = (one.contiguous(memory_format=torch.channels_last) for one in (x, weight, grad))
    ops = torch.ops.bdprune
    wanted = [one.detach().requires_grad_() for one in (x, weight, bias)]
    torch.library.opcheck(ops.winograd_conv2d.default, tuple(wanted))
    torch.library.opcheck(ops.winograd_conv2d.default, (x, weight.clone().requires_grad_(), None))
    torch.library.opcheck(ops.winograd_conv2d_input_grad.default, (grad, weight))
    torch.library.opcheck(ops.winograd_conv2d_weight_grad.default, (grad, x))


@native
def test_compiles_without_a_graph_break() -> None:
    x, weight, _, grad = tensors(SHAPES[2])
    compiled = torch.compile(winograd_conv2d, fullgraph=True, backend="aot_eager")
    found, expected = (
        forward_and_backward(function, x, weight, None, grad) for function in (compiled, winograd_conv2d)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("x", "outputs", "expected"),
    [
        ((128, 64, 32, 32), 64, True),
        ((8, 16, 4, 4), 16, True),
        ((8, 16, 7, 7), 32, True),
        ((128, 3, 32, 32), 64, False),  # few channels
        ((128, 64, 32, 32), 15, False),
        ((128, 64, 2, 2), 64, False),  # tiles over the edge
        ((128, 64, 5, 5), 64, False),
        ((8, 512, 8, 8), 512, False),  # more filters to transform than tiles
        ((16, 512, 8, 8), 512, True),
        ((0, 64, 8, 8), 64, False),
    ],
)
def test_with_avx512_a_rule_on_shapes_decides(
    x: tuple[int, ...], outputs: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_backend, "cpu_features", lambda: "avx512")
    maps, weight = torch.empty(x, device="meta"), torch.empty(outputs, x[1], 3, 3, device="meta")
    assert (
        winograd_is_faster(maps, weight)
        is winograd_is_faster(maps.expand(3, *x), weight.expand(3, *weight.shape))
        is expected
    )
    monkeypatch.setattr(_backend, "cpu_features", lambda: "avx2")
    assert winograd_is_faster(maps, weight)  # with AVX2, the rule would gain nothing
