"""Descriptions of compact networks: what is written is read again; hostile ones give one clear error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bdprune.errors import ArchitectureError, ArtifactError
from bdprune.files import description_path
from bdprune.model.architectures import build
from bdprune.model.channels import Channels, Compact, LayerChannels
from bdprune.model.description import MAX_BYTES, MAX_CHANNELS, encode_description, read_description
from bdprune.model.loading import load

CHANNELS = Channels(8, (0, 2, 5))
COMPACT = Compact("plain_cnn", {"a": LayerChannels(CHANNELS), "b": LayerChannels(None, CHANNELS)})


def write(path: Path, content: Any) -> Path:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    description_path(path).write_bytes(data)
    return path


def document(**side: Any) -> dict[str, Any]:
    layers = {"features.0": {"outputs": {"of": 4, "kept": [0, 1], **side}}}
    return {"bdprune_compact": 1, "networks": [{"arch": "plain_cnn", "layers": layers}]}


def long_name() -> dict[str, Any]:
    """A name of 501 parts: all of its prefixes would be kept."""
    return {"bdprune_compact": 1, "networks": [{"arch": "plain_cnn", "layers": {".".join(["a"] * 501): {}}}]}


def test_a_description_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = write(tmp_path / "m.pth", encode_description([COMPACT, COMPACT]))
    assert read_description(path) == (COMPACT, COMPACT)
    assert read_description(tmp_path / "other.pth") == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated"),
        (b"\x80\x04N.", "malformed"),
        (b"[" * 100_000, "."),
        ([], "Expected `object`"),
        ({}, "bdprune_compact"),
        ({**document(), "bdprune_compact": 2}, "bdprune_compact"),
        ({**document(), "code": "import os"}, "unknown field `code`"),
        ({"bdprune_compact": 1, "networks": []}, "length >= 1"),
        (document(kept=[0, 4]), "keeps channel 4 of 4"),
        (document(kept=[-1, 0]), ">= 0"),
        (document(kept=[1, 0]), "do not increase"),
        (document(kept=[1, 1]), "do not increase"),
        (document(kept=[]), "length >= 1"),
        (document(kept=["0"]), "Expected `int`"),
        (document(kept=[0.5]), "Expected `int`"),
        (document(kept={"0": 1}), "Expected `array`"),
        (document(of=0), ">= 1"),
        (document(of=True), "Expected `int`"),
        (document(of=MAX_CHANNELS + 1), "<= 1048576"),
        (document(of=10**30), "."),
        (document(more=1), "unknown field"),
        (long_name(), "has 1001 characters, more than 500"),
    ],
)
def test_a_hostile_description_gives_one_error(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(build("plain_cnn", 3, width=2).state_dict(), tmp_path / "m.pth")
    path = write(tmp_path / "m.pth", content)
    with pytest.raises(ArtifactError) as raised:
        load(path)
    assert words in raised.value.message and "m.pth.arch.json" in raised.value.message
    assert "delete it" in raised.value.hint


def test_a_huge_description_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    with description_path(path).open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ArtifactError, match="no regular file of at most"):
        read_description(path)


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(description_path(tmp_path / "m.pth"))
    with pytest.raises(ArtifactError, match="no regular file"):
        read_description(tmp_path / "m.pth")


@pytest.fixture
def compact_file(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """A network whose first conv has lost two of four filters, with any description."""
    state = build("plain_cnn", 3, width=4, input_size=16).state_dict()
    state["features.0.weight"] = state["features.0.weight"][:2]
    state["features.0.bias"] = state["features.0.bias"][:2]
    state["features.2.weight"] = state["features.2.weight"][:, :2]
    torch.save(state, tmp_path / "m.pth")

    def made(layers: dict[str, Any], arch: str = "plain_cnn") -> Path:
        return write(tmp_path / "m.pth", {"bdprune_compact": 1, "networks": [{"arch": arch, "layers": layers}]})

    return made


RIGHT = {"features.0": {"outputs": {"of": 4, "kept": [0, 1]}}, "features.2": {"inputs": {"of": 4, "kept": [0, 1]}}}


def test_the_right_description_loads(compact_file: Callable[..., Path]) -> None:
    model = load(compact_file(RIGHT))
    assert model.arch == "plain_cnn" and model.compact is not None
    assert model.network.get_submodule("features.0").out_channels == 2  # type: ignore[comparison-overlap]
    assert model.module(torch.rand(2, *model.input_shape)).shape == (2, 3)


@pytest.mark.parametrize(
    "layers",
    [
        {},
        {"features.0": RIGHT["features.0"]},
        {**RIGHT, "features.0": {"outputs": {"of": 5, "kept": [0, 1]}}},
        {**RIGHT, "features.0": {"outputs": {"of": 4, "kept": [0, 1, 2]}}},
        {**RIGHT, "features.0": {"outputs": {"of": 1 << 20, "kept": [0, 1]}}},
        {**RIGHT, "../../etc": {"outputs": {"of": 4, "kept": [0]}}},
        {**RIGHT, "__class__.__init__": {"outputs": {"of": 4, "kept": [0]}}},
        {**RIGHT, "features.1": {"outputs": {"of": 4, "kept": [0, 1]}}},
    ],
)
def test_a_description_of_another_network_gives_one_error(compact_file: Callable[..., Path], layers: Any) -> None:
    path = compact_file(layers)
    with pytest.raises(ArchitectureError, match=r"m\.pth\.arch\.json"):
        load(path)


def test_a_description_imports_nothing(compact_file: Callable[..., Path]) -> None:
    """The name of a callable is only text, until the user gives it with --arch."""
    path = compact_file({f"own.{name}": layer for name, layer in RIGHT.items()}, "antigravity:fly")
    state = torch.load(path, weights_only=True)
    torch.save({f"own.{name}.x" if "classifier" in name else f"own.{name}": v for name, v in state.items()}, path)
    with pytest.raises(ArchitectureError, match="a compact antigravity:fly, which is no known") as raised:
        load(path)
    assert "--arch antigravity:fly" in raised.value.hint and "antigravity" not in sys.modules


def test_a_description_beside_a_whole_network_is_not_used(tmp_path: Path) -> None:
    torch.save(build("plain_cnn", 3, width=4, input_size=16).state_dict(), tmp_path / "m.pth")
    model = load(write(tmp_path / "m.pth", {"bdprune_compact": 1, "networks": [{"arch": "x", "layers": RIGHT}]}))
    assert model.compact is None
