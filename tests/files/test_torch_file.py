"""Hostile and damaged torch files are rejected with a reason, before torch reads them and without running code."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bdprune.errors import ArtifactError, UnsupportedError
from bdprune.files import torch_file

Saved = Callable[..., bytes]


class Payload:
    """A hostile pickle: loading it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (eval, (f"open({str(self.path)!r}, 'w').close()",))


class System:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        import os

        return (os.system, ("true",))


def weights() -> OrderedDict[str, torch.Tensor]:
    return nn.Linear(3, 2).state_dict()


def repacked(data: bytes, change: Callable[[dict[str, bytes]], None], **settings: Any) -> bytes:
    """The zip archive with its entries changed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    change(entries)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **settings) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def pickled(entries: dict[str, bytes]) -> str:
    return next(name for name in entries if name.endswith("data.pkl"))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_valid_checkpoint_with_the_usual_extras_is_read(saved: Saved, legacy: bool) -> None:
    state = weights()
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1, momentum=0.9)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    extras = {
        "epoch": 3,
        "big": 1 << 100,
        "optimizer": optimizer.state_dict(),
        "milestones": Counter([1, 2, 2]),
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "names": {"a", "b"},
        "raw": b"\x00\xff",
        "parameter": nn.Parameter(torch.ones(2)),
        "empty": torch.empty(0, 3),
        "view": torch.arange(6.0).reshape(2, 3).t(),
        "nothing": [None, True, (1, 2, 3, 4), "ü"],
    }
    data = saved({"state_dict": state, **extras}, _use_new_zipfile_serialization=not legacy)
    (torch_file.check_legacy if legacy else torch_file.check_zip)(data)
    found = torch_file.load_checked(data)
    assert torch.equal(found["state_dict"]["weight"], state["weight"])
    assert found["state_dict"]._metadata == state._metadata  # type: ignore[attr-defined]
    for key in ("epoch", "big", "milestones", "size", "dtype", "device", "names", "raw", "nothing"):
        assert found[key] == extras[key]
    assert torch.equal(found["view"], extras["view"])  # type: ignore[arg-type]
    momentum = found["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, torch.ones(2))


@pytest.mark.parametrize("legacy", [False, True])
def test_the_payload_is_named_and_not_run(saved: Saved, legacy: bool, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    data = saved({"net": weights(), "x": Payload(victim)}, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ArtifactError, match=r"asks to run '__builtin__.eval'") as caught:
        (torch_file.check_legacy if legacy else torch_file.check_zip)(data)
    assert "Nothing was run" in caught.value.hint
    assert not victim.exists()
    pickle.loads(pickle.dumps(Payload(victim)))  # the payload works
    assert victim.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_any_protocol_are_named_by_their_globals(protocol: int) -> None:
    with pytest.raises(ArtifactError, match=r"asks to run 'os.system'"):
        torch_file.check_legacy(pickle.dumps(System(), protocol))


def test_a_harmless_pickle_is_not_a_checkpoint() -> None:
    with pytest.raises(UnsupportedError, match="not a checkpoint"):
        torch_file.check_legacy(pickle.dumps({"a": [1, 2]}))


def test_stack_global_inside_a_checkpoint_is_named(saved: Saved) -> None:
    data = saved({"net": weights(), "x": System()}, pickle_protocol=4)
    with pytest.raises(ArtifactError):
        torch_file.check_zip(data)
    crafted = b"\x80\x02X\x05\x00\x00\x00posixX\x06\x00\x00\x00system\x93."
    evil = repacked(saved(weights()), lambda entries: entries.update({pickled(entries): crafted}))
    with pytest.raises(ArtifactError, match=r"'os.system'"):
        torch_file.check_zip(evil)
    old = b"(iposix\nsystem\n."
    evil = repacked(saved(weights()), lambda entries: entries.update({pickled(entries): old}))
    with pytest.raises(ArtifactError, match=r"'os.system'"):
        torch_file.check_zip(evil)


def test_a_pickled_module_is_an_error_with_a_remedy(saved: Saved) -> None:
    with pytest.raises(ArtifactError, match=r"asks to run 'torch.nn.modules.linear.Linear'") as caught:
        torch_file.check_zip(saved(nn.Linear(2, 2)))
    assert "state_dict" in caught.value.hint


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors_are_named_as_such(saved: Saved) -> None:
    tensor = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(ArtifactError, match="quantised"):
        torch_file.check_zip(saved({"a.weight": tensor}))


def test_every_truncation_of_a_zip_is_an_error(saved: Saved) -> None:
    data = saved(weights())
    for end in range(0, len(data), 7):
        with pytest.raises(ArtifactError):
            torch_file.check_zip(data[:end])


def test_every_truncation_of_a_legacy_file_is_an_error(saved: Saved) -> None:
    data = saved(weights(), _use_new_zipfile_serialization=False)
    for end in range(len(data)):
        with pytest.raises(ArtifactError):
            torch_file.check_legacy(data[:end])


def claim(count: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Callable[[dict[str, bytes]], None]:
    """Changes the first tensor of ``weights()``: storage of ``count`` elements seen with ``size`` and ``stride``."""

    def number(value: int) -> bytes:
        raw = value.to_bytes(8, "little")
        return b"\x8a\x08" + raw

    def change(entries: dict[str, bytes]) -> None:
        name = pickled(entries)
        sizes = b"(" + b"".join(map(number, size)) + b"t"
        strides = b"(" + b"".join(map(number, stride)) + b"t"
        entries[name] = (
            b"\x80\x02}(X\x06\x00\x00\x00weightctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
            b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
            + number(count)
            + b"tQK\x00"
            + sizes
            + strides
            + b"\x89ccollections\nOrderedDict\n)RtRu."
        )

    return change


def test_a_crafted_size_is_read_if_it_is_true(saved: Saved) -> None:
    data = repacked(saved(weights()), claim(6, (2, 3), (3, 1)))
    torch_file.check_zip(data)
    assert torch_file.load_checked(data)["weight"].shape == (2, 3)


@pytest.mark.parametrize(
    ("count", "size", "stride", "message"),
    [
        (2_500_000_000, (50_000, 50_000), (50_000, 1), "claims 10000000000 bytes, but the file holds 24"),
        (6, (50_000, 50_000), (0, 0), "2500000000 elements.*storage of 6"),
        (6, (50_000, 50_000), (50_000, 1), "storage of 6"),
        (6, (2, 4), (3, 1), "storage of 6"),
        (6, (7,), (1,), "storage of 6"),
        (7, (7,), (1,), "claims 28 bytes, but the file holds 24"),
        (5, (5,), (1,), "claims 20 bytes, but the file holds 24"),
        (6, (2,), (1 << 61,), "storage of 6"),
        (1 << 62, (1,), (1,), "without a key or length"),
    ],
)
def test_sizes_are_checked_before_anything_is_allocated(
    saved: Saved, count: int, size: tuple[int, ...], stride: tuple[int, ...], message: str
) -> None:
    data = repacked(saved(weights()), claim(count, size, stride))
    assert len(data) < 2000
    with pytest.raises(ArtifactError, match=message):
        torch_file.check_zip(data)


def test_a_legacy_file_that_states_10_gigabytes_is_an_error(saved: Saved) -> None:
    data = saved({"weight": torch.zeros(3)}, _use_new_zipfile_serialization=False)
    count = (2_500_000_000).to_bytes(4, "little")
    claimed = data.replace(b"\x58\x03\x00\x00\x00cpuq", b"\x58\x03\x00\x00\x00cpuq")
    at = claimed.index(b"K\x03N")  # the storage's length and its missing view
    claimed = claimed[:at] + b"\x8a\x05" + count + b"\x00" + claimed[at + 2 :]
    claimed = claimed[:-20] + struct.pack("<q", 2_500_000_000) + claimed[-12:]
    with pytest.raises(ArtifactError, match="claims 10000000000 bytes, but the file holds 12"):
        torch_file.check_legacy(claimed)


def test_a_zip_bomb_is_rejected_without_unpacking(saved: Saved) -> None:
    def bomb(entries: dict[str, bytes]) -> None:
        entries[pickled(entries).replace("data.pkl", "data/9")] = bytes(50_000_000)

    data = repacked(saved(weights()), bomb, compression=zipfile.ZIP_DEFLATED)
    assert len(data) < 60_000
    with pytest.raises(ArtifactError, match="compressed, from 50000000 bytes to"):
        torch_file.check_zip(data)


def test_entries_that_share_their_bytes_are_errors(saved: Saved) -> None:
    """Many directory entries refer to the same bytes: a zip bomb without compression."""
    data = saved({"weight": torch.zeros(2000)})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    buffer = io.BytesIO(data)
    with zipfile.ZipFile(buffer, "a") as archive:
        for index in range(3):
            twin = zipfile.ZipInfo(info.filename[:-1] + str(index + 1))
            twin.header_offset, twin.file_size, twin.compress_size = info.header_offset, info.file_size, info.file_size
            twin.CRC = info.CRC
            archive.filelist.append(twin)
        archive._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(ArtifactError, match=r"claims \d+ bytes in a file of|damaged"):
        torch_file.check_zip(buffer.getvalue())


@pytest.mark.parametrize("name", ["archive/../x", "other/data/1", "/etc/passwd", "archive/a\\b", "archive/\x07"])
def test_unusual_entry_names_are_errors(saved: Saved, name: str) -> None:
    with pytest.raises(ArtifactError, match="invalid name"):
        torch_file.check_zip(repacked(saved(weights()), lambda entries: entries.update({name: b""})))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_the_same_name_are_an_error(saved: Saved) -> None:
    buffer = io.BytesIO(saved(weights()))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(ArtifactError, match=r"two entries named 'data.pkl'"):
        torch_file.check_zip(buffer.getvalue())


def test_bytes_around_the_archive_are_an_error(saved: Saved) -> None:
    data = saved(weights())
    with pytest.raises(ArtifactError):
        torch_file.check_zip(data + b"x")
    with pytest.raises(ArtifactError):
        torch_file.check_zip(b"PK" + data)
    buffer = io.BytesIO(data)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"PK"
    with pytest.raises(ArtifactError, match="follow the directory"):
        torch_file.check_zip(buffer.getvalue())


def test_a_flipped_bit_in_a_weight_is_found_by_its_checksum(saved: Saved) -> None:
    state = weights()
    data = saved(state)
    at = data.index(state["weight"].numpy().tobytes())
    with pytest.raises(ArtifactError, match="damaged"):
        torch_file.check_zip(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def test_other_zip_archives_are_not_checkpoints(saved: Saved) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UnsupportedError, match=r"without data.pkl"):
        torch_file.check_zip(buffer.getvalue())
    with pytest.raises(UnsupportedError, match="TorchScript"):
        torch_file.check_zip(repacked(saved(weights()), lambda e: e.update({"archive/constants.pkl": b""})))
    with pytest.raises(UnsupportedError):
        torch_file.check_zip(b"PK\x05\x06" + bytes(18))


def test_a_missing_storage_and_an_unknown_byte_order_are_errors(saved: Saved) -> None:
    def without(entries: dict[str, bytes]) -> None:
        del entries["archive/data/0"]

    with pytest.raises(ArtifactError, match="storage '0' is missing"):
        torch_file.check_zip(repacked(saved(weights()), without))
    with pytest.raises(ArtifactError, match="byte order"):
        torch_file.check_zip(repacked(saved(weights()), lambda e: e.update({"archive/byteorder": b"middle"})))


def test_bytes_after_the_pickle_or_the_last_tensor_are_errors(saved: Saved) -> None:
    def longer(entries: dict[str, bytes]) -> None:
        entries[pickled(entries)] += b"x"

    with pytest.raises(ArtifactError, match=r"follow the end of data.pkl"):
        torch_file.check_zip(repacked(saved(weights()), longer))
    with pytest.raises(ArtifactError, match="3 bytes follow the last tensor"):
        torch_file.check_legacy(saved(weights(), _use_new_zipfile_serialization=False) + b"abc")


def test_a_giant_pickle_is_rejected_unread(saved: Saved) -> None:
    def giant(entries: dict[str, bytes]) -> None:
        entries[pickled(entries)] = bytes((16 << 20) + 1)

    with pytest.raises(ArtifactError, match="more than any state dict"):
        torch_file.check_zip(repacked(saved(weights()), giant))


def test_an_error_of_torch_is_an_artifact_error() -> None:
    with pytest.raises(ArtifactError, match="refuses it"):
        torch_file.load_checked(pickle.dumps(System(), 2))


def test_legacy_headers_that_do_not_fit_are_errors(saved: Saved) -> None:
    data = saved(weights(), _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedError, match="unknown version"):
        torch_file.check_legacy(data.replace(b"M\xe9\x03.", b"M\xea\x03.", 1))
    at = data.rindex(b"X", 0, data.rindex(b"e."))  # the last key in the list of storages
    with pytest.raises(ArtifactError, match="does not match"):
        torch_file.check_legacy(data[: at + 5] + b"x" + data[at + 6 :])


def test_a_legacy_list_of_storages_with_a_doubling_key_is_rejected_at_once(saved: Saved) -> None:
    """Each step refers twice to the previous one: its text would have 2^60 parts."""
    data = saved(weights(), _use_new_zipfile_serialization=False)
    start = data.index(b"\x80\x02]q\x00(X", 100)
    doubling = b"".join(b"q%ch%c\x86" % (index, index) for index in range(60))
    with pytest.raises(ArtifactError, match="does not match"):
        torch_file.check_legacy(data[:start] + b"\x80\x02]" + b")" + doubling + b"a.")


def test_encrypted_entries_are_errors(saved: Saved) -> None:
    data = bytearray(saved(weights()))
    at = data.index(b"PK\x01\x02")
    data[at + 8] |= 1
    with pytest.raises(ArtifactError, match="encrypted"):
        torch_file.check_zip(bytes(data))
