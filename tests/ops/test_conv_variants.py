"""The choice among the variants of a masked convolution for each shape, and equal results of all variants."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bdprune.ops import conv_variants, kept_choices, masked_conv2d, stacked_conv2d

from .helpers import random

SETTING = ((1, 1), (1, 1), (1, 1), 1)


@pytest.fixture(autouse=True)
def _untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BDPRUNE_TUNE", raising=False)


class Variants:
    """Two variants that record how they were run, and a timer that returns the seconds of each."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.ran: list[str] = []
        self.grads: list[tuple[bool, ...]] = []

    def __call__(self, operands: conv_variants.Operands, setting: object = SETTING) -> str:
        runs = {name: self._run(name) for name in self.seconds}
        return conv_variants.choose(runs, operands, setting, self._time)

    def _run(self, name: str) -> conv_variants.Run:
        def run(x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
            self.ran.append(name)
            self.grads.append((x.requires_grad, weight.requires_grad, mask is not None and mask.requires_grad))
            return x * 2 if mask is None else x * 2 * mask.sum()

        return run

    def _time(self, run: Callable[[], object], device: torch.device) -> float:
        run()
        return self.seconds[self.ran[-1]]


def operands(samples: int = 4, **learn: bool) -> conv_variants.Operands:
    x, weight, mask = random((2, samples, 3, 5, 5)), random((2, 4, 3, 3, 3)), random((2, 4))
    learning = {"x": x, "weight": weight, "mask": mask}
    for name in learn:
        learning[name].requires_grad_()
    return x, weight, mask, None


def test_the_faster_variant_is_tried_once_and_kept() -> None:
    variants = Variants(kernel=2.0, library=1.0)
    assert variants(operands()) == "library" and variants.ran == ["kernel", "library"] * 3
    assert variants(operands()) == "library" and len(variants.ran) == 6
    (choice,) = kept_choices()
    assert (choice.question, choice.winner, choice.seconds) == ("conv", "library", {"kernel": 2.0, "library": 1.0})
    assert "x [2, 4, 3, 5, 5] float64" in choice.shape


def test_different_settings_are_tried_separately() -> None:
    variants = Variants(kernel=1.0, library=2.0)
    x, weight, mask, _ = operands()
    others: list[tuple[conv_variants.Operands, Any]] = [
        (operands(), SETTING),
        (operands(), ((2, 2), (1, 1), (1, 1), 1)),
        (operands(x=True), SETTING),
        (operands(mask=True), SETTING),
        ((x.movedim(2, -1).contiguous().movedim(-1, 2), weight, mask, None), SETTING),
        ((x, weight.movedim(2, -1).contiguous().movedim(-1, 2), mask, None), SETTING),
        ((x.float(), weight.float(), mask, None), SETTING),
        ((x, weight, mask, torch.ones(2, 4)), SETTING),
        ((x[0], weight, mask, None), SETTING),
        (operands(5), SETTING),
    ]
    for count, (some, setting) in enumerate(others, 1):
        assert variants(some, setting) == "kernel"
        assert len(variants.ran) == 6 * count
    variants(operands(8))  # a batch of the same power of two as 5
    assert len(variants.ran) == 6 * len(others)


def test_a_trial_computes_the_needed_gradients_and_leaves_the_tensors_unchanged() -> None:
    variants, some = Variants(kernel=1.0, library=2.0), operands(x=True, mask=True)
    variants(some)
    assert set(variants.grads) == {(True, False, True)}
    assert some[0].grad is None and some[2] is not None and some[2].grad is None


def test_tracing_reads_no_stored_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = Variants(kernel=2.0, library=1.0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert variants(operands()) == "kernel" and variants.ran == []


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = Variants(kernel=1.0, library=2.0)
    monkeypatch.setenv("BDPRUNE_TUNE", "conv=library")
    assert variants(operands()) == "library"
    monkeypatch.setenv("BDPRUNE_TUNE", "conv=grouped")
    assert variants(operands()) == "kernel", "the variant does not exist here"
    assert variants.ran == []


@pytest.mark.parametrize("way", ["library", "grouped"])
@pytest.mark.parametrize("own_x", [False, True], ids=["one_batch", "own_batches"])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_variant_of_the_library_gives_the_same_result(
    way: str, own_x: bool, groups: int, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    x = random((3, 2, 4, 6, 5) if own_x else (2, 4, 6, 5), device=device)
    weight, mask = random((3, 6, 4 // groups, 3, 3), device=device, seed=1), random((3, 6), device=device, seed=2)
    bias = random((3, 6), device=device, seed=3)
    expected = masked_conv2d(x, weight, mask, bias, stride=2, padding=1, groups=groups)
    plain = stacked_conv2d(x, weight, None, 1, "same", 1, groups)
    monkeypatch.setattr(sys.modules["bdprune.ops.stacked_conv2d"], "takes", lambda x: True)
    monkeypatch.setenv("BDPRUNE_TUNE", f"conv={way}")
    assert torch.allclose(
        masked_conv2d(x, weight, mask, bias, stride=2, padding=1, groups=groups), expected, rtol=1e-12, atol=1e-12
    )
    assert torch.allclose(stacked_conv2d(x, weight, None, 1, "same", 1, groups), plain, rtol=1e-12, atol=1e-12)
