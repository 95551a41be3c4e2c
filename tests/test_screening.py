"""bdprune.screening: correct norms without torch, and one clear error for each faulty file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bdprune.errors import ArtifactError, UnsupportedError
from bdprune.files import safetensors_file
from bdprune.ops import reference
from bdprune.screening import screen


def write(path: Path, header: object, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "conv1.weight": torch.randn(20, 3, 3, 3, generator=generator),
        "conv2.weight": torch.randn(7, 40, 5, 5, generator=generator).double(),
        "half.weight": torch.randn(5, 9, 3, 3, generator=generator).half(),
        "brain.weight": torch.randn(5, 9, 1, 1, generator=generator).bfloat16(),
        "empty.weight": torch.zeros(4, 0, 3, 3),
        "bn.weight": torch.ones(20),
        "steps": torch.ones(2, 2, 2, 2, dtype=torch.int64),
    }
    tensors["conv1.weight"][4, 0, 0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", tensors


@pytest.mark.parametrize("native", [True, False], ids=["core", "numpy"])
def test_norms_of_a_checkpoint(
    checkpoint: tuple[Path, dict[str, torch.Tensor]], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tensors = checkpoint
    if not native:
        monkeypatch.setitem(sys.modules, "bdprune._core", None)
        monkeypatch.delattr("bdprune._core", raising=False)
    norms = screen(path)
    expected = {"conv1.weight", "conv2.weight", "half.weight", "brain.weight", "empty.weight"}
    assert set(norms) == expected
    for name in expected:
        exact = reference.spectral_norms(tensors[name], None).numpy()
        # The core sums products of narrower weights in float32 over short runs.
        rtol = 3e-7 if native and tensors[name].dtype != torch.float64 else 1e-13
        assert np.allclose(norms[name], exact, rtol=rtol, atol=0.0, equal_nan=True)
    assert np.isnan(norms["conv1.weight"]).tolist() == [i == 4 for i in range(20)]


def test_torch_is_not_imported(checkpoint: tuple[Path, dict[str, torch.Tensor]]) -> None:
    code = "import sys; from bdprune.screening import screen; screen(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(checkpoint[0])], check=True)


def entry(shape: list[object], begin: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (entry([10**5, 10**4, 1, 1], 0, 4 * 10**9), "not fully covered"),
        (entry([1, 1, 3, 3], 0, 40), "invalid shape"),
        (entry([2, 1, 3, 3], 0, 36), "invalid shape, data type, or offset"),
        (entry([1, 1, 3, 3], 8, 0), "invalid offset for tensor `w`"),
        (entry([1, 1, -3, -3], 0, 36), "integer `-3`"),
        (entry([1, 1, 3, 3.0], 0, 36), "floating point `3.0`"),
        (entry([1, 1, 3, True], 0, 12), "boolean `true`"),
        (entry([1, 1, 3, 3], "0", 36), 'string "0"'),
        (entry([1, 1, 3, 3], 0, 36, dtype=7), "invalid type"),
        ({"w": []}, "invalid length 0"),
        (b'{"w": 1', "invalid JSON"),
        (
            json.dumps({"w": {}, "v": entry([9], 0, 36)["w"]})
            .replace("{}", json.dumps(entry([9], 0, 36)["w"]))
            .replace("v", "w")
            .encode(),
            "twice",
        ),
        (b'{"w": ' + b"[" * 100_000, "recursion limit"),
        (b'{"w": "\xff"}', "invalid UTF-8"),
    ],
)
def test_a_damaged_header_is_one_clear_error(header: object, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.safetensors", header, np.ones(9, dtype=np.float32).tobytes())
    with pytest.raises(ArtifactError, match=message):
        screen(path)


@pytest.mark.parametrize("content", [b"", b"1234567", b"\x80\x02" + b"x" * 100, b"PK\x03\x04" + b"\0" * 60])
def test_another_kind_of_file_is_unsupported(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(UnsupportedError, match="not a safetensors file"):
        screen(path)


def test_tensors_that_share_their_bytes_are_an_error(tmp_path: Path) -> None:
    one = {"dtype": "F32", "shape": [1, 1, 3, 3], "data_offsets": [0, 36]}
    path = write(tmp_path / "shared.safetensors", {"a": one, "b": one}, np.ones(9, dtype=np.float32).tobytes())
    with pytest.raises(ArtifactError, match=r"invalid offset for tensor `[ab]`"):
        screen(path)
    empty = {"dtype": "F32", "shape": [0, 1, 3, 3], "data_offsets": [0, 0]}
    path = write(tmp_path / "apart.safetensors", {"a": one, "b": empty}, np.ones(9, dtype=np.float32).tobytes())
    assert {name: len(norms) for name, norms in screen(path).items()} == {"a": 1, "b": 0}


def test_pipes_and_folders_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UnsupportedError, match="not a regular file"):
            screen(path)


def test_a_giant_header_is_rejected_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "big.safetensors", entry([1, 1, 3, 3], 0, 36), bytes(36))
    monkeypatch.setattr(safetensors_file, "_MAX_HEADER_BYTES", 10)
    with pytest.raises(ArtifactError, match="its header has 71 bytes"):
        screen(path)


def test_a_missing_file_and_a_file_without_convolutions(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read: No such file"):
        screen(tmp_path / "none.safetensors")
    assert screen(write(tmp_path / "empty.safetensors", {"__metadata__": {"a": "b"}})) == {}
