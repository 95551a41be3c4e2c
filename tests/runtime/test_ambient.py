"""Calls in a program that has changed the state of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from bdprune.errors import OptionError
from bdprune.fleet import scan
from bdprune.pipeline import load, purify
from bdprune.runtime import plain_torch


@pytest.fixture
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("state", [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)])
def test_the_state_is_plain_within_and_restored_afterwards(state: AbstractContextManager[Any]) -> None:
    def now() -> tuple[bool, bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

    with state:
        before = now()
        with plain_torch():
            assert now() == (True, False, False)
        assert now() == before != (True, False, False)


@pytest.mark.parametrize("state", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_repair_and_a_scan_give_the_same_in_any_state(bright: Any, state: Any) -> None:
    def weights() -> dict[str, torch.Tensor]:
        return purify(bright.model, bright.data, method="fine_tuning", max_acc_drop=1.0).model.network.state_dict()

    def evidence() -> list[float | None]:
        return [one.score for one in scan(bright.model, bright.data, detectors="lipschitz,unlearning").detectors]

    expected, found = weights(), evidence()
    with state():
        repaired, scanned = weights(), evidence()
    assert scanned == found
    assert all(torch.equal(value, expected[name]) for name, value in repaired.items())


def test_a_module_can_be_repaired_without_gradients(bright: Any) -> None:
    with torch.inference_mode():
        done = purify(bright.model.network, bright.data, method="fine_tuning", input_shape=bright.model.input_shape)
    assert done.result.method == "bdprune.fine_tuning"


@pytest.mark.usefixtures("doubles")
def test_another_default_dtype_is_an_error_that_names_it(tiny: Any) -> None:
    for call in (lambda: load(tiny.path), lambda: scan(tiny.path), lambda: purify(tiny.path, tiny.data)):
        with pytest.raises(OptionError, match=r"torch.float64, and bdprune computes in float32") as caught:
            call()
        assert "set_default_dtype" in caught.value.hint
