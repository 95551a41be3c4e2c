"""bdprune.files.lazy: the same contents as a full reading, without reading a tensor, and nothing is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bdprune.errors import ArtifactError, NoWeightsError, UnsupportedError
from bdprune.files import open_stored, read_checkpoint, safetensors_file, torch_file

FORMS = ("zip", "legacy", "safetensors")


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict(
        {
            "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
            "conv.bias": torch.randn(4, generator=generator).half(),
            "steps": torch.tensor(3),
            "fc.weight": torch.randn(5, 4, generator=generator).bfloat16(),
        }
    )


def write(path: Path, value: object, form: str) -> Path:
    if form == "safetensors":
        assert isinstance(value, dict)
        save_file(dict(value), path)
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.mark.parametrize("form", FORMS)
def test_contents_are_those_of_a_full_reading(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "model", state(), form)
    stored, full = open_stored(path), read_checkpoint(path)
    assert (stored.format, stored.bytes, stored.sha256()) == (full.format, full.bytes, full.sha256)
    assert list(stored.states) == [""] and stored.files == (path,)
    found = stored.states[""]
    assert set(found) == set(state()) and not found["steps"].is_floating_point()
    for name, tensor in state().items():
        assert found[name].shape == tuple(tensor.shape)
        if tensor.is_floating_point():
            assert (found[name].read() == tensor.double().numpy()).all()


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_several_sets_of_weights_and_other_contents(tmp_path: Path, form: str) -> None:
    one = state()
    value = {
        "epoch": 3,
        "ema": state(1),
        "state_dict": one,
        "again": one,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(4, 3, 3, 3)}}, "param_groups": [{"lr": 0.1}]},
        "averaged": [torch.ones(4, 3, 3, 3), torch.ones(5, 4)],
    }
    path = write(tmp_path / "model.pth", value, form)
    stored = open_stored(path)
    assert list(stored.states) == [found.name for found in read_checkpoint(path).contents.states]
    assert list(stored.states) == ["state_dict", "ema"]
    assert stored.outside == read_checkpoint(path).contents.outside != ()
    assert (stored.states["ema"]["conv.weight"].read() == state(1)["conv.weight"].double().numpy()).all()


@pytest.mark.parametrize("form", FORMS)
def test_shards(tmp_path: Path, form: str) -> None:
    names = {}
    for number, (name, tensor) in enumerate(state().items(), 1):
        names[name] = f"model-{number:05d}-of-00004.bin"
        write(tmp_path / names[name], {name: tensor}, form)
    index = tmp_path / "model.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    stored, full = open_stored(index), read_checkpoint(index)
    assert (stored.format, stored.bytes, stored.sha256()) == (full.format, full.bytes, full.sha256)
    assert list(stored.states[""]) == list(state())
    assert (stored.states[""]["fc.weight"].read() == state()["fc.weight"].double().numpy()).all()
    index.write_text(json.dumps({"weight_map": names | {"gone": names["steps"]}}))
    with pytest.raises(ArtifactError, match=r"^Cannot load .*: only the index names the tensor 'gone' of the shard"):
        open_stored(index)
    index.write_text(json.dumps({"weight_map": names | {"gone": index.name}}))
    with pytest.raises(ArtifactError, match=r"its shard 'model\.index\.json' cannot be read: it is an index itself"):
        open_stored(index)
    index.write_text(json.dumps({"weight_map": {"a": "../b"}}))
    with pytest.raises(ArtifactError, match="not a file next to it"):
        open_stored(index)


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "model.pth"
    value = {"conv.weight": torch.ones(4, 3, 3, 3), "x": Malicious(mark)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(Malicious(mark)))
    else:
        write(path, value, form)
    with pytest.raises(ArtifactError, match=r"asks to run 'os.system', which no state dict needs\. Nothing was run"):
        open_stored(path)
    assert not mark.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_a_truncated_file_is_one_clear_error(tmp_path: Path, form: str, share: float) -> None:
    path = write(tmp_path / "model", state(), form)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ArtifactError, match=r"^Cannot load"):
        open_stored(path)


def rebuilt(path: Path, change: dict[str, bytes]) -> None:
    """Writes a zip archive again with other contents of some entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, change.get(name.partition("/")[2], content))


def test_sizes_that_the_file_does_not_hold_are_refused_before_memory_is_used(tmp_path: Path) -> None:
    path = write(tmp_path / "model.pth", {"conv.weight": torch.ones(4, 3, 3, 3)}, "zip")
    rebuilt(path, {"data/0": b"1234"})
    with pytest.raises(ArtifactError, match="a tensor storage claims 432 bytes, but the file holds 4"):
        open_stored(path)
    # One storage under very many names.
    one = torch.ones(64, 3, 3, 3)
    many = write(tmp_path / "many.pth", {f"{i}.weight": one for i in range(100)}, "zip")
    with pytest.raises(ArtifactError, match="its tensors claim 172800 elements in a file of"):
        open_stored(many)


def test_an_entry_that_is_elsewhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "model.pth", {"conv.weight": torch.ones(4, 3, 3, 3)}, "zip")
    data = path.read_bytes()
    place = data.index(b"model/data/0")
    path.write_bytes(data[:place] + b"model/data/1" + data[place + 12 :])
    with pytest.raises(ArtifactError, match="entry 'model/data/0' of the zip archive is not where its directory says"):
        open_stored(path)


def test_a_legacy_pickle_with_a_huge_string_allocates_nothing(tmp_path: Path) -> None:
    data = write(tmp_path / "a.pth", state(), "legacy").read_bytes()
    start = 3 * 0 + len(pickle.dumps(torch_file.LEGACY_MAGIC, 2))
    path = tmp_path / "huge.pth"
    path.write_bytes(data[:start] + b"\x80\x02X" + struct.pack("<I", 1 << 31) + b"abc")
    with pytest.raises(ArtifactError, match=r"the header is damaged: 'a value of 2147483648 bytes'"):
        open_stored(path)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", ArtifactError, "the file is empty"),
        (b"1234567", UnsupportedError, "not a checkpoint of torch.save or safetensors"),
        (b"\x89HDF\r\n\x1a\n", UnsupportedError, "it is an HDF5 file"),
        (b"PK\x03\x04" + b"\0" * 60, ArtifactError, "truncated or damaged"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, error: type[ArtifactError], message: str) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(error, match=message):
        open_stored(tmp_path / "model.bin")


def test_missing_files_folders_pipes_and_odd_paths(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "none.pth", "No such file or directory"),
        (tmp_path, "it is a folder"),
        (tmp_path / "pipe", "it is not a regular file"),
        (tmp_path / "a\0b", "null byte"),
    ):
        with pytest.raises(ArtifactError, match=message):
            open_stored(path)


def test_files_without_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "scheduler.pt", {"last_epoch": 3, "base_lrs": [0.1]}, "zip")
    with pytest.raises(NoWeightsError, match="only the state of a learning-rate scheduler"):
        open_stored(path)
    torch.save(np.random.RandomState(0).get_state(), tmp_path / "random.pt")
    with pytest.raises(NoWeightsError, match="only Python objects, such as 'numpy"):
        open_stored(tmp_path / "random.pt")


def test_a_file_that_shrinks_or_goes_away_after_it_was_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "model.pth", state(), "zip")
    stored = open_stored(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ArtifactError, match="it became shorter while it was read"):
        stored.states[""]["fc.weight"].read()
    path.unlink()
    with pytest.raises(ArtifactError, match="it cannot be read: No such file"):
        stored.states[""]["fc.weight"].read()
    with pytest.raises(ArtifactError, match="it cannot be read: No such file"):
        stored.sha256()


def header(path: Path, entries: object, data: bytes = b"") -> Path:
    encoded = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def entry(shape: list[object], begin: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


@pytest.mark.parametrize(
    ("entries", "message"),
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
        (entry([4, 1, 3, 3], 0, 36, dtype="F8_E4M3"), "unsupported type 'F8_E4M3'"),
        (entry([1] * 17 + [9], 0, 36), "impossible shape"),
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
def test_a_damaged_header_is_one_clear_error(entries: object, message: str, tmp_path: Path) -> None:
    path = header(tmp_path / "bad.safetensors", entries, np.ones(9, dtype=np.float32).tobytes())
    with pytest.raises(ArtifactError, match=message):
        open_stored(path)


def test_tensors_that_share_their_bytes_are_an_error(tmp_path: Path) -> None:
    one = {"dtype": "F32", "shape": [1, 1, 3, 3], "data_offsets": [0, 36]}
    path = header(tmp_path / "shared.safetensors", {"a": one, "b": one}, np.ones(9, dtype=np.float32).tobytes())
    with pytest.raises(ArtifactError, match=r"invalid offset for tensor `[ab]`"):
        open_stored(path)


def test_a_giant_header_is_rejected_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = header(tmp_path / "big.safetensors", entry([1, 1, 3, 3], 0, 36), bytes(36))
    monkeypatch.setattr(safetensors_file, "_MAX_HEADER_BYTES", 10)
    with pytest.raises(ArtifactError, match="its header has 71 bytes"):
        open_stored(path)


def test_reading_a_zip_archive_opens_only_its_pickle(tmp_path: Path) -> None:
    path = write(tmp_path / "model.pth", {"conv.weight": torch.ones(512, 512, 3, 3)}, "zip")

    class Counted(io.FileIO):
        total = 0

        def readinto(self, buffer: object) -> int:  # type: ignore[override]
            count = super().readinto(buffer)  # type: ignore[arg-type]
            Counted.total += count
            return count

    with io.BufferedReader(Counted(path)) as file:
        places = torch_file.places_in_zip(file, path.stat().st_size)
    assert list(places.starts) == ["0"] and Counted.total < 100_000 < path.stat().st_size
