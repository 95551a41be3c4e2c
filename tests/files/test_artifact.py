"""Files are recognised by content, not by extension; unknown content is one clear error."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bdprune.errors import ArtifactError, NoWeightsError, UnsupportedError
from bdprune.files.artifact import MAX_FILE_BYTES, read_checkpoint
from bdprune.files.safetensors_file import dump_safetensors

Write = Callable[..., Path]


@pytest.mark.parametrize("kind", ["torch-zip", "torch-legacy", "safetensors"])
def test_the_format_of_a_file_is_recognised(write: Write, kind: str) -> None:
    state = nn.Conv2d(1, 2, 3).state_dict()
    if kind == "safetensors":
        path = write(dump_safetensors(state, {}), "model.pth")
    else:
        path = write(state, "model.safetensors", _use_new_zipfile_serialization=kind == "torch-zip")
    found = read_checkpoint(str(path))
    assert (found.format, found.path) == (kind, path)
    assert found.bytes == path.stat().st_size
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    (only,) = found.contents.states
    assert only.paths == ((),) and torch.equal(only.tensors()["weight"], state["weight"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
        (b"GGUF" + bytes(50), "GGUF"),
        (b"\x1f\x8b\x08" + bytes(50), "gzip"),
        (b"<!DOCTYPE html><html>", "failed download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"storages" + bytes(249) + b"ustar" + bytes(250), "tar archive"),
        (b"hello", "not a checkpoint"),
        (b"\x00" * 100, "not a checkpoint"),
    ],
)
def test_other_formats_are_named(write: Write, content: bytes, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        read_checkpoint(write(content))
    assert "model.pth" in caught.value.message and caught.value.hint


def test_missing_empty_and_unreadable_files_and_folders_are_errors(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(ArtifactError, match="empty"):
        read_checkpoint(write(b""))
    with pytest.raises(UnsupportedError, match="folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(ArtifactError, match="null"):
        read_checkpoint(Path("a\0b"))

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ArtifactError, match="Permission denied") as caught:
        read_checkpoint(tmp_path / "model.pth")
    assert "permissions" in caught.value.hint


@pytest.mark.parametrize("head", [b"GGUF", b"", b"\x80\x04K\x01."])
def test_a_large_file_of_another_format_is_not_read_whole(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "large.pth"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(1 << 30)  # takes no space on the disk, but a gigabyte in memory
    tracemalloc.start()
    with pytest.raises(UnsupportedError):
        read_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


def test_devices_pipes_and_giants_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UnsupportedError, match="not a regular file"):
            read_checkpoint(path)
    giant = tmp_path / "giant.pth"
    with giant.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(UnsupportedError, match=r"8589934593 bytes"):
        read_checkpoint(giant)


@pytest.mark.parametrize("content", [{}, {"epoch": 1}, [1, 2], torch.ones(3), {"a": {"b": torch.ones(2)}}])
def test_a_checkpoint_without_weights_is_an_error(write: Write, content: Any) -> None:
    with pytest.raises(NoWeightsError, match="has no weights of a network, only"):
        read_checkpoint(write(content))


def test_weights_outside_a_state_dict_are_not_ignored(write: Write) -> None:
    with pytest.raises(UnsupportedError, match="has no state dict") as caught:
        read_checkpoint(write({"shadow_params": [torch.ones(2, 3), torch.ones(3, 3)]}))
    assert not isinstance(caught.value, NoWeightsError)
