"""channel_scale and masked_conv2d: values, gradients, and the weight gradient that must never be computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bdprune.ops import _backend, channel_scale, masked_conv2d

from .helpers import DTYPES, assert_error_ratio, random, rounding, threads

native = pytest.mark.skipif(not _backend.HAS_OPS, reason="the compiled ops are not built or not wanted")

SHAPES = [(5, 7), (3, 4, 6, 6), (2, 64, 8, 8), (2, 3, 33, 17), (4, 1, 7, 7), (3, 21, 1, 1), (2, 5, 11), (2, 8, 2, 3, 4)]


def layouts(x: Tensor) -> list[Tensor]:
    """The same values in several memory orders: plain, channels_last, with gaps, with transposed axes."""
    strided = x.new_zeros(x.shape[0], 2 * x.shape[1], *x.shape[2:])[:, ::2].copy_(x)
    permuted = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return [x, x.movedim(1, -1).contiguous().movedim(-1, 1), strided, permuted]


def broadcast(mask: Tensor, z: Tensor) -> Tensor:
    return mask.view(1, -1, *[1] * (z.dim() - 2))


def gradients(product: Tensor, z: Tensor, mask: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(product, (z, mask), grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_pytorch(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
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


def test_layout_is_kept(device: str) -> None:
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


def test_zero_masks_silence_and_nan_shows(device: str) -> None:
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


CONVS: list[dict[str, Any]] = [
    {"x": (2, 4, 6, 6), "weight": (5, 4, 3, 3)},
    {"x": (2, 4, 7, 7), "weight": (6, 4, 3, 3), "stride": 2, "padding": 1},
    {"x": (1, 3, 9, 9), "weight": (4, 3, 7, 7), "padding": 3},
    {"x": (2, 1, 5, 5), "weight": (3, 1, 3, 3), "padding": "same"},
    {"x": (2, 6, 5, 5), "weight": (4, 6, 1, 1)},
    {"x": (2, 4, 6, 6), "weight": (4, 1, 3, 3), "padding": 1, "groups": 4},
    {"x": (2, 4, 8, 6), "weight": (6, 2, 3, 3), "padding": (2, 1), "dilation": (2, 1), "groups": 2},
    {"x": (0, 4, 6, 6), "weight": (5, 4, 3, 3)},
]


def conv_case(case: dict[str, Any], dtype: torch.dtype, device: str) -> tuple[list[Tensor], dict[str, Any]]:
    """(x, weight, mask, bias) and the remaining arguments."""
    shapes = [case["x"], case["weight"], case["weight"][:1], case["weight"][:1]]
    settings = {key: value for key, value in case.items() if key not in ("x", "weight")}
    return [random(shape, dtype, device, seed) for seed, shape in enumerate(shapes)], settings


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_masked_conv_equals_conv_with_masked_weight(
    case: dict[str, Any], dtype: torch.dtype, with_bias: bool, device: str
) -> None:
    (x, weight, mask, bias), settings = conv_case(case, dtype, device)
    bias_or_none = bias if with_bias else None

    def masked_weight(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
        masked_bias = None if bias is None else mask * bias
        return F.conv2d(x, weight * mask.view(-1, 1, 1, 1), masked_bias, **settings)

    wide = [None if t is None else t.double() for t in (x, weight, mask, bias_or_none)]
    exact = masked_weight(*wide)
    plain = masked_weight(x, weight, mask, bias_or_none)
    ours = masked_conv2d(x, weight, mask, bias_or_none, **settings)
    # Ours rounds twice where the masked weight is rounded once before the sum.
    assert_error_ratio(ours, plain, exact, 2 * rounding(exact, dtype, weight[0].numel()))


@pytest.mark.parametrize("case", CONVS[:-1], ids=str)
def test_gradcheck_of_the_masked_conv(case: dict[str, Any], device: str) -> None:
    (x, weight, mask, bias), settings = conv_case(case, torch.float64, device)

    def run(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        return masked_conv2d(x, weight, mask, bias, **settings)

    assert torch.autograd.gradcheck(run, tuple(t.requires_grad_() for t in (x, weight, mask, bias)), fast_mode=True)


class ConvBackwards(TorchDispatchMode):
    """Records which gradients each convolution backward was asked for: (input, weight, bias)."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[tuple[bool, bool, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(tuple(args[-1]))
        return func(*args, **(kwargs or {}))


def test_no_weight_gradient_when_only_masks_are_learned(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDPRUNE_TUNE", "conv=library")  # our kernel's backward has no convolution of PyTorch's at all
    x = random((2, 3, 8, 8), torch.float32, device)
    weights = [random(s, torch.float32, device, i) for i, s in enumerate([(4, 3, 3, 3), (5, 4, 3, 3)])]
    masks = [torch.ones(4, device=device, requires_grad=True), torch.ones(5, device=device, requires_grad=True)]
    hidden = masked_conv2d(x, weights[0], masks[0], torch.ones(4, device=device))
    loss = masked_conv2d(hidden, weights[1], masks[1]).square().sum()
    with ConvBackwards() as recorded:
        loss.backward()
    # The second convolution passes its input's gradient on; the first has nothing to do at all.
    assert recorded.masks == [(True, False, False)]
    assert all(mask.grad is not None and mask.grad.abs().min() > 0 for mask in masks)
    assert all(weight.grad is None for weight in weights)


def test_the_profiler_sees_the_weight_gradient_only_when_it_is_asked_for(device: str) -> None:
    x, mask = random((1, 3, 8, 8), torch.float32, device), torch.ones(4, device=device, requires_grad=True)

    def backward_ops(weight: Tensor) -> set[str]:
        loss = masked_conv2d(x, weight, mask).sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            loss.backward()
        return {event.key for event in profile.key_averages()}

    weight = random((4, 3, 3, 3), torch.float32, device)
    assert "aten::convolution_backward" not in backward_ops(weight)
    assert "aten::convolution_backward" in backward_ops(weight.requires_grad_())


def test_weight_and_bias_learn_when_they_ask(device: str) -> None:
    (x, weight, mask, bias), settings = conv_case(CONVS[1], torch.float64, device)
    weight.requires_grad_()
    bias.requires_grad_()
    masked_conv2d(x, weight, mask, bias, **settings).square().sum().backward()
    expected = torch.autograd.grad(
        (broadcast(mask, x) * F.conv2d(x, weight, bias, **settings)).square().sum(), (weight, bias)
    )
    assert torch.allclose(weight.grad, expected[0]) and torch.allclose(bias.grad, expected[1])


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


@pytest.mark.parametrize("fastest", [False, True], ids=["nchw", "channels_last"])
def test_compiles_without_a_graph_break(fastest: bool, device: str) -> None:
    (x, weight, mask, bias), settings = conv_case(CONVS[1], torch.float32, device)
    x = x.contiguous(memory_format=torch.channels_last) if fastest else x

    def loss(x: Tensor, mask: Tensor) -> Tensor:
        return masked_conv2d(x, weight, mask, bias, **settings).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for run in (loss, compiled):
        own_x, own_mask = x.detach().requires_grad_(), mask.clone().requires_grad_()
        value = run(own_x, own_mask)
        results.append((value.detach(), *torch.autograd.grad(value, (own_x, own_mask))))
    for eager, graph in zip(*results, strict=True):
        assert torch.allclose(eager, graph, rtol=1e-5, atol=1e-5)


def test_wrong_arguments_say_what_they_got() -> None:
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
    with pytest.raises(ValueError, match="4 dimensions"):
        masked_conv2d(z[0], torch.ones(2, 3, 3, 3), torch.ones(2))
    with pytest.raises(ValueError, match="groups=2"):
        masked_conv2d(z, torch.ones(2, 3, 3, 3), torch.ones(2), groups=2)
    with pytest.raises(ValueError, match=r"mask must be \[2\]"):
        masked_conv2d(z, torch.ones(2, 3, 3, 3), torch.ones(3))
