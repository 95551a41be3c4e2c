"""What a name of the Hub stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bdprune.errors import HubError, OptionError, UnsupportedError
from bdprune.hub.repository import listed, one_file

from ..hub_server import Hub, commit_of

START = f"hf:org/name@{commit_of(1)}/"


def index(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"t{number}": shard for number, shard in enumerate(shards)}}).encode()


def test_a_moving_branch_cannot_change_the_files(hub: Hub) -> None:
    repository = hub.add("org/name", {"model.safetensors": b"old"})
    found = listed("hf:org/name@main")
    repository.commits[commit_of(2)] = {"model.safetensors": b"new"}
    repository.branches["main"] = commit_of(2)
    assert [one.name for one in found.files] == [f"{START}model.safetensors"]
    assert Path(found.files[0]).read_bytes() == b"old"
    assert Path(listed("hf:org/name@main").files[0]).read_bytes() == b"new"


def test_nothing_but_indices_is_downloaded_to_list_and_all_files_are_accounted_for(hub: Hub) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    files = {one: b"12345" for one in [*shards, "pytorch_model.bin", "README.md", "a.onnx"]}
    hub.add("org/name", files | {"model.safetensors.index.json": index(*shards), "sub/x.pth": b"1"})
    found = listed("hf:org/name")
    assert hub.downloads() == ["model.safetensors.index.json"]
    assert [one.name.removeprefix(START) for one in found.files] == ["model.safetensors.index.json", "sub/x.pth"]
    assert list(found.files[0].sizes) == ["model.safetensors.index.json", *shards]
    assert found.count == 7 and found.download == 11 and sum(map(len, found.skipped.values())) == 3
    assert [one.partition(" ")[0] for one in found.unscanned] == [f"{START}a.onnx", f"{START}pytorch_model.bin"]
    local = found.files[0].fetch()
    assert (local.parent / shards[1]).read_bytes() == b"12345"


@pytest.mark.parametrize("content", [b"{", index("../../evil"), index("gone.safetensors")])
def test_a_bad_index_is_left_to_the_loader(hub: Hub, content: bytes) -> None:
    hub.add("org/name", {"model.safetensors.index.json": content})
    (file,) = listed("hf:org/name").files
    assert file.fetch().read_bytes() == content


def test_the_description_of_a_compact_network_comes_along(hub: Hub) -> None:
    hub.add("org/name", {"a/m.safetensors": b"1", "a/m.safetensors.arch.json": b"{}"})
    local = listed("hf:org/name").files[0].fetch()
    assert local.with_name("m.safetensors.arch.json").read_bytes() == b"{}"


def test_the_limit_counts_what_the_cache_does_not_hold(hub: Hub) -> None:
    hub.add("org/name", {"a.bin": b"1" * 2048, "b.bin": b"1" * 1024})
    assert listed("hf:org/name", 3072).download == 3072
    with pytest.raises(OptionError, match=r"download of 3 KiB, more than the limit of 2 KiB") as caught:
        listed("hf:org/name", 2048)
    assert "--max-download" in caught.value.hint
    listed("hf:org/name/a.bin").files[0].fetch()
    assert listed("hf:org/name", 2048).download == 1024


def test_the_default_limit_is_ten_gibibytes(hub: Hub) -> None:
    hub.add("org/name", {"a.bin": b""}, lies={"a.bin": (10 << 30) + 1})
    with pytest.raises(OptionError, match=r"limit of 10\.0 GiB"):
        listed("hf:org/name")


def test_no_checkpoint_is_one_error(hub: Hub) -> None:
    hub.add("org/name", {"README.md": b"", "a.onnx": b"1"})
    hub.add("org/empty", {})
    with pytest.raises(UnsupportedError, match=r"No checkpoint in hf:org/name\. Found .*ONNX.* \(1\)"):
        listed("hf:org/name")
    with pytest.raises(UnsupportedError, match="Found no files"):
        listed("hf:org/empty")
    for file in ("b.bin", "*.bin"):
        with pytest.raises(HubError, match="has no checkpoint"):
            listed(f"hf:org/name/{file}")


def test_commands_for_one_model_need_one(hub: Hub) -> None:
    hub.add("org/name", {"a.bin": b"1", "b.bin": b"2"})
    assert one_file("hf:org/name/b.bin").name == f"{START}b.bin"
    with pytest.raises(OptionError, match=r"2 checkpoints: a\.bin, b\.bin") as caught:
        one_file("hf:org/name")
    assert f"{START}a.bin" in caught.value.hint
