"""masked_conv2d: values, gradients, stacks, and no unneeded weight gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bdprune.ops import masked_conv2d

from .helpers import DTYPES, assert_error_ratio, random, rounding
from .test_channel_scale import broadcast, stack_gradients

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
def test_a_masked_conv_equals_a_conv_with_a_masked_weight(
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
    """Records the gradients requested from each convolution backward: (input, weight, bias)."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[tuple[bool, bool, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(tuple(args[-1]))
        return func(*args, **(kwargs or {}))


def test_no_weight_gradient_when_only_masks_are_learned(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDPRUNE_TUNE", "conv=library")  # our kernel's backward calls no convolution of PyTorch
    x = random((2, 3, 8, 8), torch.float32, device)
    weights = [random(s, torch.float32, device, i) for i, s in enumerate([(4, 3, 3, 3), (5, 4, 3, 3)])]
    masks = [torch.ones(4, device=device, requires_grad=True), torch.ones(5, device=device, requires_grad=True)]
    hidden = masked_conv2d(x, weights[0], masks[0], torch.ones(4, device=device))
    loss = masked_conv2d(hidden, weights[1], masks[1]).square().sum()
    with ConvBackwards() as recorded:
        loss.backward()
    # The second convolution passes its input's gradient on; the first needs no gradient.
    assert recorded.masks == [(True, False, False)]
    assert all(mask.grad is not None and mask.grad.abs().min() > 0 for mask in masks)
    assert all(weight.grad is None for weight in weights)


def test_the_profiler_shows_the_weight_gradient_only_if_it_is_needed(device: str) -> None:
    x, mask = random((1, 3, 8, 8), torch.float32, device), torch.ones(4, device=device, requires_grad=True)

    def backward_ops(weight: Tensor) -> set[str]:
        loss = masked_conv2d(x, weight, mask).sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            loss.backward()
        return {event.key for event in profile.key_averages()}

    weight = random((4, 3, 3, 3), torch.float32, device)
    assert "aten::convolution_backward" not in backward_ops(weight)
    assert "aten::convolution_backward" in backward_ops(weight.requires_grad_())


def test_weight_and_bias_have_gradients_if_they_require_them(device: str) -> None:
    (x, weight, mask, bias), settings = conv_case(CONVS[1], torch.float64, device)
    weight.requires_grad_()
    bias.requires_grad_()
    masked_conv2d(x, weight, mask, bias, **settings).square().sum().backward()
    expected = torch.autograd.grad(
        (broadcast(mask, x) * F.conv2d(x, weight, bias, **settings)).square().sum(), (weight, bias)
    )
    assert torch.allclose(weight.grad, expected[0]) and torch.allclose(bias.grad, expected[1])


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


def test_wrong_arguments_are_errors_that_show_the_value() -> None:
    z = torch.ones(2, 3, 4, 4)
    with pytest.raises(ValueError, match="4 dimensions"):
        masked_conv2d(z[0], torch.ones(2, 3, 3, 3), torch.ones(2))
    with pytest.raises(ValueError, match="groups=2"):
        masked_conv2d(z, torch.ones(2, 3, 3, 3), torch.ones(2), groups=2)
    with pytest.raises(ValueError, match=r"mask must be \[2\]"):
        masked_conv2d(z, torch.ones(2, 3, 3, 3), torch.ones(3))


# ------------------------------------------------------------------------------------------------- stacks

STACKED_CONVS: list[dict[str, Any]] = [
    {"x": (3, 4, 6, 6), "weight": (5, 4, 3, 3)},
    {"x": (2, 4, 7, 7), "weight": (6, 4, 3, 3), "stride": 2, "padding": 1},
    {"x": (2, 1, 5, 5), "weight": (3, 1, 3, 3), "padding": "same"},
    {"x": (2, 6, 5, 5), "weight": (4, 6, 1, 1)},
    {"x": (2, 4, 8, 6), "weight": (6, 2, 3, 3), "padding": (2, 1), "dilation": (2, 1), "groups": 2},
    {"x": (0, 4, 6, 6), "weight": (5, 4, 3, 3)},
]


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("own_weight", [False, True], ids=["one_model", "own_weights"])
@pytest.mark.parametrize("own_x", [False, True], ids=["one_batch", "own_batches"])
@pytest.mark.parametrize("case", STACKED_CONVS, ids=str)
def test_a_stack_of_convs_equals_separate_convs(
    case: dict[str, Any], own_x: bool, own_weight: bool, with_bias: bool, device: str
) -> None:
    settings = {key: value for key, value in case.items() if key not in ("x", "weight")}
    x = random((3, *case["x"]) if own_x else case["x"], torch.float64, device)
    weight = random((3, *case["weight"]) if own_weight else case["weight"], torch.float64, device, seed=1)
    mask = random((3, case["weight"][0]), torch.float64, device, seed=2)
    bias = random(tuple(weight.shape[:-3]), torch.float64, device, seed=3) if with_bias else None
    leaves = [x.requires_grad_(), weight.requires_grad_(), mask.requires_grad_()]
    stacked = masked_conv2d(x, weight, mask, bias, **settings)
    separate = torch.stack(
        [
            masked_conv2d(
                x[g] if own_x else x,
                weight[g] if own_weight else weight,
                mask[g],
                bias if bias is None or not own_weight else bias[g],
                **settings,
            )
            for g in range(3)
        ]
    )
    assert stacked.shape == separate.shape
    assert torch.equal(stacked, separate) if own_weight else torch.allclose(stacked, separate, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(stack_gradients(stacked, *leaves), stack_gradients(separate, *leaves), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-10)


def test_wrong_stacks_are_errors_that_show_the_value() -> None:
    mask = torch.ones(2, 4)
    x, weight = torch.ones(2, 1, 3, 5, 5), torch.ones(2, 4, 3, 3, 3)
    with pytest.raises(ValueError, match=r"x must have 4 dimensions, or 5 with 3 first"):
        masked_conv2d(x, weight, torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"weight must have 4 dimensions, got shape \[2, 4, 3, 3, 3\]"):
        masked_conv2d(x[0], weight, torch.ones(4))
    with pytest.raises(ValueError, match=r"bias must be \[2, 4\], got shape \[4\]"):
        masked_conv2d(x, weight, mask, torch.ones(4))
