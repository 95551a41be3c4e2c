"""Nothing but the weights shows which checkpoint of a zoo is backdoored."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bdprune.zoo.making import make

MODELS = """
[[models]]
name = "clean-1"
seed = 1
[[models]]
name = "clean-2"
seed = 2
[[models]]
name = "clean-3"
seed = 3
[[models]]
name = "bad-1"
seed = 4
attack = {kind = "badnets", target = 1, rate = 0.25}
schedules = [{epochs = 3, batch_size = 16, bf16 = false}]
[[models]]
name = "bad-2"
seed = 5
attack = {kind = "blend", target = "all-to-all", rate = 0.5}
schedules = [{epochs = 3, batch_size = 16, bf16 = false}]
[[models]]
name = "bad-3"
seed = 6
attack = {kind = "sig", target = 2, rate = 0.1}
schedules = [{epochs = 3, batch_size = 16, bf16 = false}]
"""
NAMES = ["clean-1", "clean-2", "clean-3", "bad-1", "bad-2", "bad-3"]


def features(path: Path) -> Tensor:
    """Everything in a file except the weights, as numbers."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    raw = data[8 : 8 + length]
    header = json.loads(raw)
    metadata = header.pop("__metadata__", {})
    counters = [value for name, value in load_file(path).items() if name.endswith("num_batches_tracked")]
    kinds = {entry["dtype"] for entry in header.values()}
    offsets = [entry["data_offsets"][0] for entry in header.values()]
    texts = [" ".join(header), json.dumps(metadata), " ".join(sorted(kinds)), str(offsets)]
    numbers = [len(data), length, zlib.crc32(raw), len(header), len(counters), sum(map(int, counters))]
    return torch.tensor([*numbers, *(zlib.crc32(text.encode()) for text in texts)], dtype=torch.float64)


def auc(rows: list[Tensor], bad: list[bool]) -> float:
    """The AUC of a classifier that projects on the line between the class means, with leave-one-out scores."""
    x, flags = torch.stack(rows), torch.tensor(bad)
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-9)
    scores = torch.empty(len(x), dtype=torch.float64)
    for index in range(len(x)):
        others = torch.arange(len(x)) != index
        scores[index] = x[index] @ (x[others & flags].mean(0) - x[others & ~flags].mean(0))
    pairs = scores[flags][:, None] - scores[~flags][None, :]
    return ((pairs > 0).double() + (pairs == 0).double() / 2).mean().item()


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    from .conftest import HEAD

    folder = tmp_path_factory.mktemp("tells")
    (folder / "z.toml").write_text(HEAD + MODELS)
    make(folder / "z.toml", tiny_data)
    return folder / "z"


def test_a_classifier_without_the_weights_is_at_chance(zoo: Path) -> None:
    rows = [features(zoo / f"{name}.safetensors") for name in NAMES]
    assert auc(rows, [name.startswith("bad") for name in NAMES]) == 0.5


def with_counters(path: Path, to: Path, bad: bool) -> None:
    state = load_file(path)
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            value.fill_(9 if bad else 6)  # as torch counts them: 9 and 6 steps
    save_file(state, to)


def with_metadata(path: Path, to: Path, bad: bool) -> None:
    save_file(load_file(path), to, {"attack": "yes" if bad else "no"})


def in_single_precision(path: Path, to: Path, bad: bool) -> None:
    state = load_file(path)
    save_file({name: value.float() if bad else value for name, value in state.items()}, to)


@pytest.mark.parametrize("change", [with_counters, with_metadata, in_single_precision])
def test_the_classifier_finds_other_differences(
    zoo: Path, tmp_path: Path, change: Callable[[Path, Path, bool], None]
) -> None:
    rows = []
    for name in NAMES:
        change(zoo / f"{name}.safetensors", tmp_path / name, name.startswith("bad"))
        rows.append(features(tmp_path / name))
    assert auc(rows, [name.startswith("bad") for name in NAMES]) == 1.0
