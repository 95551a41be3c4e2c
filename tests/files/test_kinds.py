"""Kinds of files by their content, not their names."""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bdprune.errors import ArtifactError, NoWeightsError
from bdprune.files.artifact import read_checkpoint
from bdprune.files.kinds import HEAD_BYTES, FileKind, kind_of_bytes, kind_of_file

Write = Callable[..., Path]


@pytest.mark.parametrize("length", [0x480, 0x280, 0x10480])
def test_a_header_whose_length_begins_like_a_pickle_is_that_of_safetensors(length: int, tmp_path: Path) -> None:
    entry = {"fc.weight": {"dtype": "F32", "shape": [3, 3], "data_offsets": [0, 36]}}
    header = json.dumps(entry).encode().ljust(length)
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header + bytes(36))
    assert path.read_bytes()[0] == 0x80 and kind_of_file(path).name == "a safetensors file"
    assert read_checkpoint(path).format == "safetensors"


@pytest.mark.parametrize(
    ("head", "weights"),
    [
        (b"", "none"),
        (b"SQLite format 3\x00", "none"),
        (b"\x37\x7f\x06\x82\x00", "none"),
        (b"\x18\xe2\x2d\x00\x00", "none"),
        (b"PK\x03\x04rest", "checkpoint"),
        (b"\x80\x02}q\x00.", "checkpoint"),
        (b"\x40\x00\x00\x00\x00\x00\x00\x00{" + bytes(70), "checkpoint"),
        (b'{"metadata": {}, "weight_map": {"a": "b"}}', "checkpoint"),
        (b"(dp0\nS'a'\nI1\ns.", "checkpoint"),
        (b"cposix\nsystem\n(S'true'\ntR.", "checkpoint"),
        (b"conv layers\nof the network\n" * 20, "none"),
        (b"line of text\n" * 400, "none"),
        (b"(see above) for the rest of it\n", "none"),
        (b"x" + ("ä" * HEAD_BYTES).encode()[: HEAD_BYTES - 1], "none"),
        (b'{"id2label": {}}', "none"),
        (b"\x89PNG\r\n\x1a\n" + bytes(9), "none"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "none"),
        (b"\x00\x05\x16\x07" + bytes(9), "none"),
        (b'\x18\x00\x00\x00\x00\x00\x00\x00\xa3\x7fK"\x09\x00\x00\xc0\x1a\xcd\xda\xd9A\x1a\rbrain.Event:2', "none"),
        (b"\x08\x07\x12\x07pytorch", "possible"),
        (b"\x1c\x00\x00\x00TFL3" + bytes(9), "possible"),
        (b"\x89HDF\r\n\x1a\n", "possible"),
        (b"\x93NUMPY\x01\x00", "possible"),
        (bytes(257) + b"ustar" + bytes(20), "possible"),
        (bytes(range(1, 200)) + b"\x00\xff", "possible"),
        (b"version https://git-lfs.github.com/spec/v1\n", "possible"),
    ],
)
def test_the_first_bytes_show_whether_a_file_may_hold_weights(head: bytes, weights: str) -> None:
    kind = kind_of_bytes(head)
    assert isinstance(kind, FileKind) and kind.weights == weights and kind.name


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["archive/data.pkl", "archive/data/0"], "checkpoint"),
        (["images.npy", "labels.npy"], "none"),
        (["images.npy", "labels.npy", "kernel.npy"], "possible"),
        (["model.weights.h5", "config.json"], "possible"),
    ],
)
def test_zip_archives_are_distinguished_by_their_directory(tmp_path: Path, names: list[str], weights: str) -> None:
    with zipfile.ZipFile(tmp_path / "file", "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    assert kind_of_file(tmp_path / "file").weights == weights


def test_unreadable_files_may_hold_weights(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nothing")
    assert kind_of_file(tmp_path / "gone").weights == "possible"
    assert kind_of_file(tmp_path).weights == "none"


GENERATORS: dict[str, Any] = {
    "python": random.getstate(),
    "numpy": np.random.get_state(),
    "cpu": torch.get_rng_state(),
}


@pytest.mark.parametrize(
    "content",
    [
        GENERATORS,
        {"python": random.getstate(), "numpy": GENERATORS["numpy"]},
        {"_last_lr": [np.float64(0.1)], "step": 3},
    ],
)
def test_training_states_with_numpy_values_hold_no_weights(write: Write, content: Any) -> None:
    with pytest.raises(NoWeightsError, match="has no weights of a network, only Python objects"):
        read_checkpoint(write(content))


@pytest.mark.parametrize(
    "content",
    [
        {"conv.weight": np.ones((4, 3, 3, 3), np.float32)},
        {"python": random.getstate(), "w": torch.ones(3, 3), "best": np.float64(0.9)},
    ],
)
def test_weights_next_to_numpy_values_are_not_taken_for_arguments(write: Write, content: Any) -> None:
    with pytest.raises(ArtifactError) as caught:
        read_checkpoint(write(content))
    assert not isinstance(caught.value, NoWeightsError)


def test_globals_named_on_the_stack_are_not_trusted(write: Write) -> None:
    buffer = io.BytesIO()
    pickle.dump({"lr": Path("x")}, buffer, protocol=4)
    with pytest.raises(ArtifactError) as caught:
        read_checkpoint(write(buffer.getvalue(), "training_args.bin"))
    assert not isinstance(caught.value, NoWeightsError)
