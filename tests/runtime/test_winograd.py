"""Convolutions of whole networks by Winograd's algorithm: which convolutions use it, and their results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.errors import OptionError
from bdprune.loops.recovery import RecoverSettings, recover
from bdprune.loops.unlearning import UnlearnSettings, unlearn
from bdprune.model.edit.mask import MaskedNetwork
from bdprune.model.handle import Model
from bdprune.ops import _backend, masked_conv2d
from bdprune.runtime import precision, winograd
from bdprune.runtime.precision import Plan, plan_for
from bdprune.runtime.winograd import WinogradConvs, has_winograd_convs

pytestmark = pytest.mark.skipif(not _backend.HAS_OPS, reason="the compiled ops are not built or switched off")

UNLEARN = UnlearnSettings(lr=0.05, weight_decay=0, batch_size=60, padding=0, max_epochs=2, stop_accuracy=0.0)
RECOVER = RecoverSettings(batch_size=60, epochs=2, padding=0)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Makes every possible conv use Winograd's algorithm, even if it is slower; yields the shapes of their inputs."""
    seen: list[tuple[int, ...]] = []

    def takes_over(x: Tensor, weight: Tensor) -> bool:
        seen.append(tuple(x.shape))
        return True

    monkeypatch.setattr(winograd, "winograd_is_faster", takes_over)
    yield seen


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding="same", bias=False),
        nn.Conv2d(4, 4, (3, 3), (1, 1), 1, (1, 1)),
    ],
    ids=str,
)
def test_convs_that_use_winograd(conv: nn.Conv2d, always: list[Any]) -> None:
    assert has_winograd_convs(nn.Sequential(nn.ReLU(), conv))
    x = torch.randn(2, 4, 6, 6)
    expected = conv(x)
    with WinogradConvs():
        out = conv(x)
    assert len(always) == 1
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=(1, 0)),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
        nn.Conv2d(4, 4, 5, padding=1),
        nn.Conv2d(4, 4, 3, padding=1).double(),
    ],
    ids=str,
)
def test_convs_that_do_not_use_winograd(conv: nn.Conv2d, always: list[Any]) -> None:
    assert not has_winograd_convs(conv)
    x = torch.randn(2, 4, 6, 6, dtype=conv.weight.dtype)
    expected = conv(x)
    with WinogradConvs():
        assert torch.equal(conv(x), expected)
    assert not always


def test_padding_of_another_mode_runs_first(always: list[Any]) -> None:
    conv, x = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), torch.randn(2, 4, 6, 6)
    with WinogradConvs():
        assert torch.equal(
            conv(x), functional.conv2d(functional.pad(x, (1, 1, 1, 1), "reflect"), conv.weight, conv.bias)
        )
    assert not always


def test_an_image_without_a_batch_does_not_use_winograd(always: list[Any]) -> None:
    with WinogradConvs():
        assert nn.Conv2d(4, 4, 3, padding=1)(torch.randn(4, 6, 6)).shape == (4, 6, 6)
    assert not always


def test_the_plan_gives_nearly_the_same_logits_and_leaves_the_module_unchanged(bright: Any, always: list[Any]) -> None:
    module = bright.model.clone().module
    plan = Plan(winograd=True)
    plan.arrange(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    exact = Plan().logits(module, bright.data.images[:20])
    assert not always
    logits = plan.logits(module, bright.data.images[:20])
    assert len(always) == 2
    torch.testing.assert_close(logits, exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
    assert not torch.equal(logits, exact)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(Plan().logits(module, bright.data.images[:20]), exact)


def masked(winograd: bool, x: Tensor, weight: Tensor, **settings: Any) -> Tensor:
    factors = torch.linspace(0, 1, len(weight), dtype=x.dtype)
    with WinogradConvs() if winograd else nullcontext():
        return masked_conv2d(x, weight, factors, **settings)


@pytest.mark.parametrize(
    "case",
    [
        {"padding": 0},
        {"padding": 1, "stride": 2},
        {"padding": 2, "dilation": 2},
        {"padding": 1, "groups": 2},
        {"padding": (1, 0)},
        {"padding": 1, "kernel": 5},
        {"padding": 1, "dtype": torch.float64},
        {"padding": 1, "empty": True},
    ],
    ids=str,
)
def test_masked_convs_that_do_not_use_winograd(case: dict[str, Any], always: list[Any]) -> None:
    settings = {key: value for key, value in case.items() if key in ("padding", "stride", "dilation", "groups")}
    dtype, kernel = case.get("dtype", torch.float32), case.get("kernel", 3)
    x = torch.randn(0 if case.get("empty") else 2, 4, 8, 8, dtype=dtype)
    weight = torch.randn(6, 4 // case.get("groups", 1), kernel, kernel, dtype=dtype)
    assert torch.equal(masked(True, x, weight, **settings), masked(False, x, weight, **settings))
    assert not always


def test_same_padding_of_a_masked_conv_is_padding_of_one(always: list[Any]) -> None:
    x, weight = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3)
    assert torch.equal(masked(True, x, weight, padding="same"), masked(True, x, weight, padding=1))
    assert len(always) == 2


def test_autocast_keeps_the_masked_convolution(always: list[Any]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = masked(True, torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3), padding=1)
    assert out.dtype == torch.bfloat16 and not always


def test_masked_convs_use_winograd_only_if_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "winograd_is_faster", lambda x, weight: False)
    x, weight = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3)
    assert torch.equal(masked(True, x, weight, padding=1), masked(False, x, weight, padding=1))


def test_masked_convs_use_winograd_in_one_op(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return original(x, *rest)

    original = winograd.winograd_masked_conv2d
    monkeypatch.setattr(winograd, "winograd_masked_conv2d", run)
    monkeypatch.setattr(winograd, "winograd_is_faster", lambda x, weight: len(weight) > 4)
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())
    plain = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    masked = MaskedNetwork(Model(plain, "plain", 3, (3, 8, 8))).train()
    images = torch.rand(5, 3, 8, 8)
    grads = []
    for plan in (Plan(), Plan(winograd=True)):
        loss = functional.cross_entropy(plan.logits(masked, images), torch.tensor([0, 1, 2, 0, 1]))
        grads.append(torch.autograd.grad(loss, list(masked.masks.values())))
        assert shapes == ([(5, 4, 8, 8)] if plan.winograd else []), "the other one has too few filters"
    for ours, direct in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(ours, direct, rtol=1e-4, atol=1e-6)


def test_winograd_unlearns_and_recovers_like_float32(
    bright: Any, always: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = (
        unlearn(bright.model, bright.data, UNLEARN, precision="float32"),
        recover(bright.model, bright.data, RECOVER, precision="float32"),
    )
    assert not always
    monkeypatch.setenv("BDPRUNE_TUNE", "precision=winograd")
    fast = (
        unlearn(bright.model, bright.data, UNLEARN, precision="auto"),
        recover(bright.model, bright.data, RECOVER, precision="auto"),
    )
    assert always and fast[0].plan == fast[1].plan == Plan(winograd=True)
    losses = [[step.loss for step in result.trajectory] for result in (exact[0], fast[0])]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2, abs=1e-3)
    for name, expected in exact[1].masks.items():
        torch.testing.assert_close(fast[1].masks[name], expected, rtol=0, atol=1e-3)


def test_winograd_is_not_tried_if_no_conv_can_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Plan] = []
    monkeypatch.setenv("BDPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(precision, "_one_pass", lambda plan, *_: tried.append(plan))
    network = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Flatten(), nn.LazyLinear(2))
    images = torch.rand(4, 3, 8, 8)
    network(images)
    plan_for("auto", network, images)
    assert tried and not any(plan.winograd for plan in tried)


def test_a_conv_uses_winograd_if_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    wide, narrow = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(15, 32, 3, padding=1)
    x = torch.randn(4, 16, 8, 8)
    with WinogradConvs():
        outs = wide(x), narrow(x[:, :15])
    assert not torch.equal(outs[0], wide(x)) and torch.equal(outs[1], narrow(x[:, :15]))


def test_under_autocast_convs_do_not_use_winograd(always: list[Any]) -> None:
    conv, x = nn.Conv2d(16, 16, 3, padding=1), torch.randn(4, 16, 8, 8)
    with torch.autocast("cpu", torch.bfloat16), WinogradConvs():
        assert conv(x).dtype == torch.bfloat16
    assert not always


def test_winograd_is_the_default_for_channels_last_networks() -> None:
    images = torch.rand(8, 3, 8, 8)
    three = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
    assert plan_for(precision.DEFAULT, three, images) == plan_for("winograd", three, images) == Plan(winograd=True)
    mangled = nn.Sequential(*three, nn.Conv2d(3, 4, 1, stride=2))  # stays contiguous: training_layout
    assert plan_for("winograd", mangled, images) == Plan(channels_last=False)
    assert plan_for("winograd", nn.Conv2d(3, 16, 5), images) == Plan()


def test_convs_of_a_precision(always: list[Any]) -> None:
    conv, x = nn.Conv2d(4, 4, 3, padding=1), torch.randn(2, 4, 6, 6)
    for name, count in (("winograd", 1), ("auto", 2), ("float32", 2), ("bfloat16", 2)):
        with precision.convs_of(name):  # type: ignore[arg-type]
            conv(x)
        assert len(always) == count
    with pytest.raises(OptionError, match="float8"):
        precision.convs_of("float8")  # type: ignore[arg-type]
