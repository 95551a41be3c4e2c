"""State dicts in wrappers, several in one file, weights outside of state dicts, types and invalid values."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdprune.errors import ArtifactError, NoWeightsError, UnsupportedError
from bdprune.files.artifact import with_values
from bdprune.files.state import WRAPPERS, check_expansion, check_finite, contents_of, with_dtype

W = torch.ones(2, 3)
OPTIMISER = {"state": {0: {"exp_avg": W, "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}


def places(checkpoint: Any) -> list[tuple[tuple[Any, ...], ...]]:
    return [state.paths for state in contents_of(checkpoint).states]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_finds_known_wrappers_next_to_optimiser_state(wrapper: str) -> None:
    found = contents_of({"epoch": 1, "optimizer": OPTIMISER, wrapper: {"a.weight": W, "note": "x"}})
    (only,) = found.states
    assert only.paths == ((wrapper,),) and list(only.tensors()) == ["a.weight"]
    assert found.optimisers == ("optimizer",) and found.outside == ()


def test_finds_nested_and_unknown_wrappers() -> None:
    state = {"a.weight": W}
    assert places({"model": {"state_dict": state}}) == [(("model", "state_dict"),)]
    assert places({"my_best_one": state}) == [(("my_best_one",),)]
    assert places({"a.weight": W, "epoch": 3}) == [((),)]
    assert places({"models": [state, {"a.weight": 2 * W}], 7: {"a.weight": 3 * W}}) == [
        ((7,),),
        (("models", 0),),
        (("models", 1),),
    ]
    assert places({"a.weight": W, "ema": {"a.weight": 2 * W}}) == [((),), (("ema",),)]


def test_every_set_is_found_and_trained_weights_precede_their_average() -> None:
    both = {"ema": {"a.weight": 2 * W}, "model": {"a.weight": W}, "netD": {"a.weight": 3 * W}}
    assert places(both) == [(("model",),), (("ema",),), (("netD",),)]


def test_a_dict_in_two_places_is_one_set_with_both_paths() -> None:
    state = {"a.weight": W}
    assert places({"state_dict": state, "state_dict_ema": state}) == [(("state_dict",), ("state_dict_ema",))]


def test_loops_and_shared_dicts_terminate() -> None:
    loop: dict[str, Any] = {"epoch": 1}
    loop["self"] = loop
    shared: dict[str, Any] = {}
    for _ in range(3):
        shared = {str(index): shared for index in range(500)}
    start = time.perf_counter()
    for checkpoint in (loop, shared):
        with pytest.raises(NoWeightsError):
            contents_of(checkpoint)
    assert time.perf_counter() - start < 5
    state = {"a.weight": W}
    with pytest.raises(UnsupportedError, match="in more than 64 places"):
        contents_of({str(index): state for index in range(70)})


def test_weights_outside_of_state_dicts_are_named() -> None:
    found = contents_of({"model": {"a.weight": W}, "ema": {"decay": 0.9, "shadow_params": [W, torch.ones(2), W]}})
    assert found.outside == ("ema/shadow_params[0]", "ema/shadow_params[2]")
    assert contents_of({"model": {"a.weight": W}, "kernels": {"k": torch.ones(1, 1, 3, 3)}}).outside == ("kernels/k",)
    assert contents_of({"model": {"a.weight": W}, "confusion": torch.ones(10, 10)}).outside == ()


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        (OPTIMISER, "the state of an optimiser"),
        ({"base_lrs": [0.1], "last_epoch": 3}, "learning-rate scheduler"),
        ({"python": (3, (1, 2)), "cpu": torch.zeros(9, dtype=torch.uint8)}, "random generators"),
        ({"scale": 65536.0, "growth_factor": 2.0}, "'scale', 'growth_factor'"),
        ([1, 2], "a list"),
    ],
)
def test_the_error_without_weights_names_the_content(checkpoint: Any, words: str) -> None:
    with pytest.raises(NoWeightsError, match=words):
        contents_of(checkpoint)


def test_counters_of_averaging_and_profiling_are_skipped() -> None:
    state = {"n_averaged": torch.tensor(4), "module.a.weight": W, "module.a.total_ops": torch.zeros(1)}
    assert list(contents_of(state).states[0].tensors()) == ["module.a.weight"]


NAMES = st.sampled_from(["state_dict", "ema", "model", "x", "epoch", "best"])
STATES = st.builds(lambda number: {"a.weight": torch.full((2, 3), float(number))}, st.integers(0, 9))
NESTED = st.recursive(
    STATES | st.integers() | st.just("text") | st.none(),
    lambda inner: st.dictionaries(NAMES, inner, max_size=4) | st.lists(inner, max_size=3).map(tuple) | st.lists(inner),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(checkpoint=NESTED)
def test_all_state_dicts_in_nested_dicts_are_found_and_can_be_written_back(checkpoint: Any) -> None:
    expected = dict(all_states(checkpoint, ()))
    if not expected:
        with pytest.raises(UnsupportedError):
            contents_of(checkpoint)
        return
    states = contents_of(checkpoint).states
    assert {path for state in states for path in state.paths} == set(expected)
    changed = checkpoint
    for state in states:
        changed = with_values(changed, state.paths, {"a.weight": -state.state["a.weight"] - 1})
    after = dict(all_states(changed, ()))
    assert all(torch.equal(after[path], -weight - 1) for path, weight in expected.items())
    assert same_but_weights(changed, checkpoint)


def all_states(node: Any, path: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], Tensor]]:
    """Every state dict, found by a plain search; at most six keys lead to one."""
    if len(path) > 6:
        return []
    if isinstance(node, dict) and "a.weight" in node:
        return [(path, node["a.weight"])]
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    return [found for key, value in pairs for found in all_states(value, (*path, key))]


def same_but_weights(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return list(one) == list(two) and all(same_but_weights(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(two) and len(one) == len(two) and all(map(same_but_weights, one, two))
    return isinstance(one, Tensor) or one == two


def test_values_are_replaced_without_touching_the_original() -> None:
    state = OrderedDict([("a.weight", W), ("note", "x")])
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    checkpoint = {"model": state, "epoch": 3, "optimizer": OPTIMISER}
    changed = with_values(checkpoint, [("model",)], {"a.weight": 2 * W})
    assert torch.equal(changed["model"]["a.weight"], 2 * W) and torch.equal(state["a.weight"], W)
    assert type(changed["model"]) is OrderedDict and changed["model"]._metadata == {"": {"version": 1}}
    assert changed["optimizer"] is OPTIMISER and list(changed) == list(checkpoint)


def test_copies_have_the_type_of_the_network_and_their_own_memory() -> None:
    for tensor in (W.half(), W.double(), W, W.bfloat16().t()):
        copy = with_dtype("a", tensor, torch.float32)
        assert copy.dtype == torch.float32 and copy.data_ptr() != tensor.data_ptr() and copy.is_contiguous()
    assert with_dtype("n", torch.tensor(3, dtype=torch.int32), torch.int64).dtype == torch.int64
    assert with_dtype("mask", torch.tensor([True, False]), torch.bool).tolist() == [True, False]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2, 2, dtype=torch.int8), "integers .torch.int8., so the model is quantised"),
        (torch.ones(2, 2, dtype=torch.bool), "quantised"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (torch.ones(2, 2).to_sparse(), "sparse"),
    ],
)
def test_types_that_weights_cannot_have_are_errors(tensor: Tensor, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        with_dtype("conv.weight", tensor, torch.float32)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("a", torch.tensor([[1.0, float("nan")], [float("inf"), 0.0]]), "2 of 4 values of the tensor 'a' are NaN"),
        (
            "a",
            torch.full((2, 2), 1e300, dtype=torch.float64).float(),
            "4 of 4 values .* are NaN or infinite",
        ),
        ("bn.running_var", torch.tensor([1.0, -1e-9]), "'bn.running_var' is negative"),
    ],
)
def test_invalid_values_are_errors(name: str, tensor: Tensor, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        check_finite({"first": W, name: tensor})
    assert caught.value.hint


def test_invalid_tensors_are_counted() -> None:
    broken = torch.full((2,), float("nan"))
    with pytest.raises(ArtifactError, match=r"2 of 2 values of the tensor 'a' .* \(and 2 more tensors\)"):
        check_finite({"ok": W, "a": broken, "b": broken, "c": broken})


def test_one_tensor_under_many_names_cannot_fill_the_memory() -> None:
    with pytest.raises(ArtifactError, match="claim 6000 elements in a file of 100 bytes"):
        check_expansion({str(index): W for index in range(1000)}, 100)


BELOW_OPTIMISER: list[tuple[Any, tuple[Any, ...]]] = [
    ({"state": {0: {"exp_avg": W}}, "param_groups": [], "model": {"a.weight": W}}, ("model",)),
    ({"train": {"state": {}, "param_groups": [], "ema": {"a.weight": W}}}, ("train", "ema")),
    ({"state": "finished", "param_groups": [], "a.weight": W}, ()),
    ({"state": {"hidden": {"a.weight": W}}, "param_groups": []}, ("state", "hidden")),
]


@pytest.mark.parametrize(("checkpoint", "path"), BELOW_OPTIMISER)
def test_weights_next_to_the_state_of_an_optimiser_are_found(checkpoint: Any, path: tuple[Any, ...]) -> None:
    assert places(checkpoint) == [(path,)]


def test_deeply_nested_weights_are_found_or_named() -> None:
    deep: Any = {"a.weight": W}
    for _ in range(20):
        deep = {"x": deep}
    assert len(places(deep)[0][0]) == 20
    for _ in range(20):
        deep = {"x": deep}
    found = contents_of({"model": {"a.weight": W}, "deep": deep})
    assert len(found.states) == 1 and found.outside[0].endswith("(nested too deeply)")
    with pytest.raises(UnsupportedError) as caught:
        contents_of(deep)
    assert not isinstance(caught.value, NoWeightsError)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"ema_flat": torch.ones(20_000)}, "ema_flat"),
        ({"ema": [("a.weight", W), ("b.weight", W)]}, "ema[0]"),
        ({"ema": {"w1": W, "w2": W}}, "ema: 2 tensors"),
    ],
)
def test_weights_in_other_forms_are_named(more: dict[str, Any], named: str) -> None:
    assert named in contents_of({"model": {"a.weight": W}, **more}).outside


def test_unusual_weight_names_form_a_state_dict_if_there_is_no_other() -> None:
    assert places({"w1": W, "b1": torch.ones(2)}) == [((),)]
    assert places({"dense.kernel": W, "dense.bias": torch.ones(2), "step": 3}) == [((),)]
    assert places({"l.parametrizations.weight.original0": W, "b": torch.ones(1)}) == [((),)]
    with pytest.raises(NoWeightsError):
        contents_of({"confusion": torch.ones(10, 10)})


def test_weights_whose_name_is_not_a_string_are_named_as_outside() -> None:
    contents = contents_of({"conv.weight": torch.ones(4, 3, 3, 3), 3: torch.ones(3, 3), None: torch.ones(2)})
    assert list(contents.states[0].tensors()) == ["conv.weight"] and contents.outside == ("3",)
