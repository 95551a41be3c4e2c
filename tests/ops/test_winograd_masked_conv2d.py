"""winograd_masked_conv2d compared with float64, and with the errors of the direct convolution."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bdprune.ops import (
    _backend,
    channel_scale,
    masked_conv2d,
    winograd_applies,
    winograd_conv2d,
    winograd_masked_conv2d,
)

from .helpers import layouts, native, random, threads
from .test_masked_conv2d import ConvBackwards
from .test_winograd_conv2d import BOUND, MAX, MEAN, SHAPES, channels_last, tensors

pytestmark = native

ours = winograd_masked_conv2d


def problem(shape: tuple[int, int, int, int, int]) -> tuple[Tensor, ...]:
    """x, weight, mask with a zero and a one in it, bias and the gradient of the output."""
    x, weight, bias, grad = tensors(shape)
    factors = torch.rand(len(weight), generator=torch.Generator().manual_seed(4))
    factors[0], factors[-1] = 1.0, 0.0
    return x, weight, factors, bias, grad


def direct(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    return mask[:, None, None] * F.conv2d(x, weight, bias, padding=1)


Call = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def forward_and_backward(
    call: Call, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, grad: Tensor
) -> list[Tensor]:
    """Output and gradients of x and mask."""
    own_x, own_mask = x.detach().requires_grad_(), mask.detach().requires_grad_()
    out = call(own_x, weight, own_mask, bias)
    return [out.detach(), *torch.autograd.grad(out, (own_x, own_mask), grad)]


def exact(*given: Tensor | None) -> list[Tensor]:
    return forward_and_backward(direct, *(None if one is None else one.double() for one in given))  # type: ignore[arg-type]


def assert_near(found: list[Tensor], *given: Tensor | None) -> None:
    """Within some roundings of the sum of the magnitudes of the products."""
    sizes = exact(*(None if one is None else one.abs() for one in given))
    for mine, truth, size in zip(found, exact(*given), sizes, strict=True):
        assert mine.shape == truth.shape and mine.dtype == torch.float32
        assert (mine.double() - truth).abs().max() <= BOUND * 2**-24 * size.max()


@pytest.mark.parametrize("channels, size", [(32, 32), (64, 16), (128, 8), (256, 4)])
def test_the_error_is_a_few_times_the_error_of_the_direct_path(channels: int, size: int) -> None:
    x, weight, factors, _, grad = (channels_last(one) for one in problem((16, channels, channels, size, size)))
    given = x.relu(), weight, factors, None, grad
    usual = forward_and_backward(partial(masked_conv2d, padding=1), *given)
    for mine, theirs, truth in zip(forward_and_backward(ours, *given), usual, exact(*given), strict=True):
        error, other = mine.double() - truth, theirs.double() - truth
        assert error.square().mean() <= MEAN**2 * other.square().mean()
        assert error.abs().max() <= MAX * other.abs().max()


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_layout(shape: tuple[int, int, int, int, int], with_bias: bool) -> None:
    x, weight, factors, bias, grad = problem(shape)
    offset = bias if with_bias else None
    for other_x in layouts(x):
        assert_near(
            forward_and_backward(ours, other_x, weight, factors, offset, grad), x, weight, factors, offset, grad
        )
    for other_weight, other_grad in zip(layouts(weight), layouts(grad), strict=True):
        found = forward_and_backward(ours, x, other_weight, factors, offset, other_grad)
        assert_near(found, x, weight, factors, offset, grad)


@settings(max_examples=50, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40), st.integers(1, 18), st.integers(1, 18)),
    st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_any_shape_and_scale(shape: tuple[int, int, int, int, int], scale: float) -> None:
    x, weight, factors, bias, grad = problem(shape)
    given = (x * scale, weight, factors, bias * scale, grad)
    assert_near(forward_and_backward(ours, *given), *given)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa: str) -> None:
    """The chosen instruction set is read once per process."""
    if _backend.build_info()["cpu_features"] == isa:
        pytest.skip("all other tests run on it")
    tests = [f"{__file__}::{test.__name__}" for test in (test_any_shape_and_scale, test_same_bits_with_any_threads)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env={**os.environ, "BDPRUNE_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_the_output_has_the_bits_of_a_convolution_times_a_mask(with_bias: bool) -> None:
    x, weight, factors, bias, grad = problem(SHAPES[3])
    offset = bias if with_bias else None
    found = forward_and_backward(ours, x, weight, factors, offset, grad)
    two_ops = forward_and_backward(
        lambda x, w, m, b: channel_scale(winograd_conv2d(x, w, b), m), x, weight, factors, offset, grad
    )
    assert torch.equal(found[0], two_ops[0]) and torch.equal(found[2], two_ops[2])
    assert torch.equal(ours(x, weight, factors, offset), found[0])


def test_a_mask_of_zero_silences_a_filter_and_still_has_a_gradient() -> None:
    x, weight, factors, bias, grad = problem((2, 5, 7, 9, 6))
    out, grad_x, grad_mask = forward_and_backward(ours, x, weight, factors, bias, grad)
    assert factors[-1] == 0 and not out[:, -1].any() and grad_mask[-1] != 0
    rest = forward_and_backward(ours, x, weight[:-1], factors[:-1], bias[:-1], grad[:, :-1])
    assert torch.allclose(grad_x, rest[1], rtol=1e-5, atol=1e-6)
    none = forward_and_backward(ours, x, weight, torch.zeros(7), bias, grad)
    assert not none[0].any() and not none[1].any() and none[2].all()


def test_nan_propagates_through_a_mask_of_zero() -> None:
    x, weight, factors, bias, grad = problem((1, 3, 4, 12, 12))
    out = ours(x, weight, factors, bias)
    x[0, 1, 5, 6] = float("nan")  # read by the tile of rows and columns 4 to 7 only
    spoilt = ours(x, weight, factors, bias)
    assert spoilt[0, :, 4:7, 5:8].isnan().all()
    spoilt[0, :, 4:8, 4:8] = out[0, :, 4:8, 4:8]
    assert torch.equal(spoilt, out)
    grad[0, -1] = float("inf")
    assert forward_and_backward(ours, x, weight, factors, bias, grad)[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_mask_may_have_another_dtype(dtype: torch.dtype) -> None:
    x, weight, factors, bias, grad = problem(SHAPES[0])
    found = forward_and_backward(ours, x, weight, factors.to(dtype), bias, grad)
    same = forward_and_backward(ours, x, weight, factors.to(dtype).float(), bias, grad)
    assert found[2].dtype == dtype and torch.equal(found[2], same[2].to(dtype))
    assert torch.equal(found[0], same[0]) and torch.equal(found[1], same[1])


def test_only_needed_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, factors, bias, grad = problem(SHAPES[0])
    full = forward_and_backward(ours, x, weight, factors, bias, grad)
    calls: list[tuple[str, Any]] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            def run(*args: Any) -> Any:
                calls.append((name, args[-1]))
                return getattr(torch.ops.bdprune, name)(*args)

            return run

    monkeypatch.setattr(sys.modules["bdprune.ops.winograd_masked_conv2d"], "_ops", Spy())
    learning = x.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(ours(learning, weight, factors, bias), learning, grad)[0], full[1])
    assert [name for name, _ in calls] == ["winograd_masked_conv2d", "winograd_conv2d_input_grad"]
    assert calls[0][1] is False, "no second map is written"
    calls.clear()
    learning = factors.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(ours(x, weight, learning, bias), learning, grad)[0], full[2])
    assert [name for name, _ in calls] == ["winograd_masked_conv2d", "channel_scale_backward"]


def test_weight_and_bias_have_gradients_if_they_require_them() -> None:
    x, weight, factors, bias, grad = problem(SHAPES[0])
    for learns in ((True, True), (True, False), (False, True)):
        own = [one.clone().requires_grad_(wanted) for one, wanted in zip((weight, bias), learns, strict=True)]
        wide = [one.detach().double().requires_grad_(one.requires_grad) for one in own]
        ours(x, own[0], factors, own[1]).backward(grad)
        direct(x.double(), wide[0], factors.double(), wide[1]).backward(grad.double())
        for mine, truth in zip(own, wide, strict=True):
            assert (mine.grad is None) == (truth.grad is None)
            assert mine.grad is None or torch.allclose(mine.grad.double(), truth.grad, rtol=1e-4, atol=1e-4)


def test_same_bits_with_any_threads() -> None:
    given = problem((13, 24, 40, 17, 9))
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(forward_and_backward(ours, *given))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("own_x", [False, True], ids=["one_batch", "own_batches"])
@pytest.mark.parametrize("own_weight", [False, True], ids=["one_weight", "own_weights"])
def test_a_stack_equals_its_models(own_x: bool, own_weight: bool) -> None:
    stack, (n, i, o, h, w) = 3, (2, 4, 6, 7, 5)
    x = random(((stack, n) if own_x else (n,)) + (i, h, w), torch.float32)
    weight = random(((stack, o) if own_weight else (o,)) + (i, 3, 3), torch.float32, seed=1)
    bias = random((stack, o) if own_weight else (o,), torch.float32, seed=2)
    masks, grad = random((stack, o), torch.float32, seed=3), random((stack, n, o, h, w), torch.float32, seed=4)
    out, _, grad_masks = forward_and_backward(ours, x, weight, masks, bias, grad)
    for g in range(stack):
        one = (x[g] if own_x else x, weight[g] if own_weight else weight, masks[g], bias[g] if own_weight else bias)
        alone = forward_and_backward(ours, *one, grad[g])
        assert torch.equal(out[g], alone[0]) and torch.equal(grad_masks[g], alone[2])


def test_the_direct_path_runs_by_default() -> None:
    x, weight, factors, bias, grad = problem(SHAPES[3])
    two_ops = forward_and_backward(
        lambda x, w, m, b: channel_scale(F.conv2d(x, w, b, padding=1), m), x, weight, factors, bias, grad
    )
    found = forward_and_backward(partial(masked_conv2d, padding=1), x, weight, factors, bias, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, two_ops, strict=True))
    assert not torch.equal(ours(x, weight, factors, bias), found[0])


@pytest.mark.parametrize("case", [{"dtype": torch.float64}, {"samples": 0}], ids=str)
def test_unsupported_inputs_use_the_direct_path(case: dict[str, Any]) -> None:
    dtype = case.get("dtype", torch.float32)
    x, weight = random((case.get("samples", 2), 4, 8, 8), dtype), random((6, 4, 3, 3), dtype, seed=1)
    factors = random((6,), dtype, seed=2)
    assert torch.equal(ours(x, weight, factors), masked_conv2d(x, weight, factors, padding=1))
    assert winograd_applies(x, weight, None, 1, 1, 1, 1) == (dtype == torch.float32)


def test_wrong_arguments_are_errors_that_show_the_value() -> None:
    x, factors = torch.ones(2, 3, 4, 4), torch.ones(2)
    with pytest.raises(ValueError, match=r"weight must be \[O, I, 3, 3\].*got shape \[2, 3, 5, 5\]"):
        ours(x, torch.ones(2, 3, 5, 5), factors)
    with pytest.raises(ValueError, match=r"mask must be \[2\]"):
        ours(x, torch.ones(2, 3, 3, 3), torch.ones(3))
    with pytest.raises(ValueError, match="4 dimensions"):
        ours(x[0], torch.ones(2, 3, 3, 3), factors)


def test_no_convolution_of_pytorch_runs_backward() -> None:
    x, weight, factors, _, _ = problem(SHAPES[0])
    loss = ours(x.requires_grad_(), weight, factors.requires_grad_()).sum()
    with ConvBackwards() as recorded:
        loss.backward()
    assert recorded.masks == []


@pytest.mark.parametrize("learns", [False, True])
def test_opcheck(learns: bool) -> None:
    x, weight, factors, bias, grad = problem(SHAPES[0])
    ops = torch.ops.bdprune
    for offset in (None, bias):
        wanted = x.clone().requires_grad_(), weight, factors.clone().requires_grad_(learns), offset, learns
        torch.library.opcheck(ops.winograd_masked_conv2d.default, wanted)
    torch.library.opcheck(ops.winograd_conv2d_input_grad.default, (grad, weight, factors))


def test_a_mask_that_does_not_fit_is_an_error_of_the_op() -> None:
    x, weight, factors, _, grad = problem(SHAPES[0])
    for wrong in (factors[:2], factors.double(), factors[None]):
        with pytest.raises(RuntimeError, match="mask must be float32 with one entry for each of 5 filters"):
            torch.ops.bdprune.winograd_masked_conv2d(x, weight, wrong, None, True)
        with pytest.raises(RuntimeError, match="mask must be float32"):
            torch.ops.bdprune.winograd_conv2d_input_grad(grad, weight, wrong)


def test_compiles_without_a_graph_break() -> None:
    given = problem(SHAPES[2])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    found, expected = (forward_and_backward(call, *given) for call in (compiled, ours))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
