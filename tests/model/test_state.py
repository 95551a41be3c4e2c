"""The state dict in its wrappers, prefixes, types and broken values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bdprune.errors import ArtifactError, UnsupportedError
from bdprune.model.state import PREFIXES, WRAPPERS, find_state, prefixes, to_float32

W = torch.ones(2, 3)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_finds_known_wrappers_beside_optimiser_state(wrapper: str) -> None:
    optimizer = {"state": {0: {"momentum_buffer": W, "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}
    found = find_state({"epoch": 1, "optimizer": optimizer, wrapper: {"a.weight": W, "note": "x"}})
    assert found.keys == (wrapper,) and list(found.tensors()) == ["a.weight"]


def test_finds_nested_and_unknown_wrappers() -> None:
    assert find_state({"model": {"state_dict": {"a.weight": W}}}).keys == ("model", "state_dict")
    assert find_state({"my_best_one": {"a.weight": W}}).keys == ("my_best_one",)
    assert find_state({"a.weight": W, "epoch": 3}).keys == ()


def test_trained_weights_go_before_their_average() -> None:
    both = {"ema": {"a.weight": 2 * W}, "model": {"a.weight": W}}
    assert find_state(both).keys == ("model",)


def test_two_unnamed_state_dicts_are_ambiguous() -> None:
    with pytest.raises(ArtifactError, match=r"2 state dicts: 'netD', 'netG'|2 state dicts: 'netG', 'netD'"):
        find_state({"netG": {"a.weight": W}, "netD": {"a.weight": W}})


def test_loops_and_shared_dicts_end() -> None:
    loop: dict[str, Any] = {"epoch": 1}
    loop["self"] = loop
    with pytest.raises(UnsupportedError):
        find_state(loop)
    shared: dict[str, Any] = {}
    for _ in range(3):
        shared = {str(index): shared for index in range(500)}
    with pytest.raises(UnsupportedError):
        find_state(shared)


def test_bystanders_of_averaging_and_profiling_are_left_out() -> None:
    state = {"n_averaged": torch.tensor(4), "module.a.weight": W, "module.a.total_ops": torch.zeros(1)}
    assert list(find_state(state).tensors()) == ["module.a.weight"]


@pytest.mark.parametrize("first", PREFIXES)
@pytest.mark.parametrize("second", ["", *PREFIXES])
def test_prefixes_are_found_alone_and_in_pairs(first: str, second: str) -> None:
    names = {first + second + name: W for name in ("conv1.weight", "fc.bias")}
    expected = [""] + [first] + ([first + second] if second else [])
    assert prefixes(names) == expected


def test_a_prefix_must_be_on_every_name() -> None:
    assert prefixes({"module.a": W, "b": W}) == [""]
    assert prefixes({}) == [""]


def test_copies_are_float32_and_their_own() -> None:
    half, double, count = W.half(), W.double(), torch.tensor(3)
    state = {"a": half, "b": double, "c": W, "d": W, "e": W.bfloat16().t(), "n.num_batches_tracked": count}
    found = to_float32(state, 1000)
    assert {name: tensor.dtype for name, tensor in found.items() if name != "n.num_batches_tracked"} == dict.fromkeys(
        "abcde", torch.float32
    )
    assert found["n.num_batches_tracked"] == 3 and found["n.num_batches_tracked"].dtype == torch.int64
    assert found["c"].data_ptr() != found["d"].data_ptr() != W.data_ptr()
    assert found["e"].is_contiguous()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "conv.weight",
            torch.tensor([[1.0, float("nan")], [float("inf"), 0.0]]),
            "'conv.weight' has 2 of 4 values NaN",
        ),
        ("conv.weight", torch.full((2, 2), 1e300, dtype=torch.float64), "4 of 4 values NaN or infinite"),
        ("conv.weight", torch.ones(2, 2, dtype=torch.int8), "whole numbers .torch.int8., so the model is quantised"),
        ("conv.weight", torch.ones(2, 2, dtype=torch.bool), "quantised"),
        ("conv.weight", torch.ones(2, dtype=torch.complex64), "complex64"),
        ("conv.weight", torch.ones(2, 2).to_sparse(), "sparse"),
        ("bn.running_var", torch.tensor([1.0, -1e-9]), "'bn.running_var' is negative"),
    ],
)
def test_values_that_no_network_has(name: str, tensor: Tensor, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        to_float32({"first": W, name: tensor}, 1000)
    assert caught.value.mend


def test_broken_tensors_are_counted() -> None:
    broken = torch.full((2,), float("nan"))
    with pytest.raises(ArtifactError, match=r"'a' has 2 of 2 .* so have 2 more tensors"):
        to_float32({"ok": W, "a": broken, "b": broken, "c": broken}, 1000)


def test_one_tensor_under_many_names_is_no_way_to_fill_the_memory() -> None:
    with pytest.raises(ArtifactError, match="claim 6000 elements in a file of 100 bytes"):
        to_float32({str(index): W for index in range(1000)}, 100)
