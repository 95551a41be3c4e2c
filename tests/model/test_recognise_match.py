"""Networks among the names of a state dict: prefixes, unrelated names, several networks, pruned weights."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdprune.model.architectures import build
from bdprune.model.loading import load, load_all
from bdprune.model.recognise import KnownMatcher, find_networks, merged_masks, prefixes_of, shapes_of

Shapes = dict[str, tuple[int, ...]]
NETWORK = shapes_of(build("ibau_cnn", 4, width=2, input_size=8).state_dict())


def under(prefix: str, shapes: Mapping[str, tuple[int, ...]] = NETWORK) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def found_in(shapes: Shapes) -> tuple[list[str], list[str]]:
    found, left = find_networks(shapes, KnownMatcher())
    return [one.prefix for one in found], left


@settings(max_examples=50, deadline=None)
@given(parts=st.lists(st.text("abc_x1", min_size=1, max_size=5), max_size=5))
def test_any_prefix_is_found(parts: list[str]) -> None:
    prefix = "".join(f"{part}." for part in parts)
    assert found_in(under(prefix)) == ([prefix], [])


def test_several_networks_and_remaining_names_are_found() -> None:
    shapes = under("student.") | under("teacher.module.") | {"loss.weight": (4,), "queue": (8, 128)}
    assert found_in(shapes) == (["student.", "teacher.module."], ["loss.weight", "queue"])


def test_a_network_and_its_average_are_found() -> None:
    assert found_in(under("") | under("ema_model.")) == (["ema_model.", ""], [])


def test_names_outside_the_modules_are_ignored_and_names_inside_are_not() -> None:
    assert found_in(NETWORK | {"criterion.weight": (4,)}) == ([""], ["criterion.weight"])
    assert found_in(NETWORK | {"features.3.attention.weight": (2, 2)})[0] == []


def test_other_names_contain_no_network() -> None:
    assert found_in({"a.weight": (3, 4), "b.weight": (4, 5)}) == ([], ["a.weight", "b.weight"])
    assert found_in({}) == ([], [])


def test_prefixes_are_shortest_first_and_need_two_weights() -> None:
    assert prefixes_of({"a.b.c.weight": (1, 1), "a.b.d.weight": (1, 1), "a.x.bias": (1,)}) == ["", "a.", "a.b."]


def test_a_pruned_weight_is_joined_with_its_mask() -> None:
    keys = ["c.weight_orig", "c.weight_mask", "d.weight_orig", "e.weight_mask", "f.bias"]
    assert merged_masks(keys) == {"c.weight": "c.weight_orig"}


@pytest.mark.parametrize("extra", [{"projector.weight": torch.ones(3, 2)}, {"aux.kernel": torch.ones(1, 1, 3, 3)}])
def test_weights_that_belong_to_no_network_are_named(tmp_path: Path, extra: dict[str, torch.Tensor]) -> None:
    state = build("ibau_cnn", 4, width=2, input_size=8).state_dict()
    torch.save({**{f"net.{name}": value for name, value in state.items()}, **extra}, tmp_path / "m.pth")
    artifact = load(tmp_path / "m.pth").artifact
    assert artifact and artifact.unscanned == tuple(extra) and artifact.kept == ()


def test_a_set_without_a_match_is_named_next_to_one_that_matches(tmp_path: Path) -> None:
    state = build("ibau_cnn", 4, width=2, input_size=8).state_dict()
    strange = {"a.weight": torch.ones(3, 4), "b.weight": torch.ones(4, 5)}
    torch.save({"netC": state, "netG": strange}, tmp_path / "m.pth")
    loaded = load_all(tmp_path / "m.pth")
    assert [one.name for one in loaded.unloaded] == ["netG"] and len(loaded.models) == 1
    artifact = loaded.models[0].artifact
    assert artifact and artifact.sets == ("netC", "netG") and artifact.left_out[0].startswith("netG: ")
    assert load(tmp_path / "m.pth", state_key="netC").num_classes == 4


def test_a_key_selects_a_set_and_a_wrong_key_is_an_error_that_lists_the_keys(tmp_path: Path) -> None:
    from bdprune.errors import ArchitectureError, ArtifactError

    state = build("ibau_cnn", 4, width=2, input_size=8).state_dict()
    other = build("ibau_cnn", 3, width=2, input_size=8).state_dict()
    torch.save({"model": state, "ema": other, "netG": {"a.weight": torch.ones(2, 2)}}, tmp_path / "m.pth")
    assert load(tmp_path / "m.pth").num_classes == 4
    assert load(tmp_path / "m.pth", state_key="ema").num_classes == 3
    chosen = load(tmp_path / "m.pth", state_key="ema").artifact
    assert chosen and chosen.left_out == ("model: not chosen", "netG: not chosen")
    with pytest.raises(
        ArtifactError, match=r"no set of weights named 'swa'; it holds 'model', 'ema', 'netG'"
    ) as caught:
        load(tmp_path / "m.pth", state_key="swa")
    assert "--state-key" in caught.value.hint
    with pytest.raises(ArchitectureError, match="nothing in common"):
        load(tmp_path / "m.pth", state_key="netG")


def test_parts_that_wrappers_insert_into_names_are_ignored() -> None:
    shapes = {name.replace("features.3.", "features.3._checkpoint_wrapped_module."): s for name, s in NETWORK.items()}
    shapes = {name.replace("features.0.", "features.0._fsdp_wrapped_module."): s for name, s in shapes.items()}
    (found,), left = find_networks(shapes, KnownMatcher())
    assert left == [] and set(found.keys) == set(NETWORK) and set(found.keys.values()) == set(shapes)


def test_normalisations_and_losses_next_to_a_network_are_not_unscanned_weights(tmp_path: Path) -> None:
    state = build("ibau_cnn", 4, width=2, input_size=8).state_dict()
    extra = {"0.mean": torch.ones(1, 3, 1, 1), "0.std": torch.ones(1, 3, 1, 1), "loss.pos_weight": torch.ones(1, 4)}
    torch.save({**extra, **{f"1.{name}": value for name, value in state.items()}}, tmp_path / "m.pth")
    artifact = load(tmp_path / "m.pth").artifact
    assert artifact and artifact.unscanned == () and artifact.kept == tuple(extra)


@pytest.mark.parametrize(
    "names",
    [
        [f"p{number % 3000}.a{number}.weight" for number in range(40_000)],
        [".".join(["x"] * (number % 200)) + f".n{number}.weight" for number in range(10_000)],
    ],
)
def test_many_unusual_names_are_rejected_in_seconds(names: list[str]) -> None:
    start = time.process_time()
    assert found_in(dict.fromkeys(names, (2, 2)))[0] == []
    assert time.process_time() - start < 5
