"""The models of a PATH, and the skipped files with reasons."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bdprune.errors import HubError, OptionError
from bdprune.sources import ANOTHER_NAME, Sources, check_exists, expand

from .hub_server import Hub, commit_of

WEIGHTS = {"conv.weight": torch.ones(2, 3, 3, 3), "fc.weight": torch.ones(4, 2)}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.pth", "a.safetensors", "sub/c.th", "sub/D.PT", "sub/notes.txt", "odd.xyz"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def names(sources: Sources, tree: Path) -> list[str]:
    return [str(path.relative_to(tree)) for path in sources.models]


def passed(sources: Sources) -> dict[str, tuple[bool, list[str]]]:
    """Reason -> whether it may hold weights, names of files."""
    return {reason: (possible, [path.name for path in paths]) for (reason, possible), paths in sources.skipped.items()}


def test_a_folder_gives_its_sorted_checkpoints(tree: Path) -> None:
    found = expand([tree])
    assert names(found, tree) == ["a.safetensors", "b.pth", "sub/D.PT", "sub/c.th"]
    assert passed(found) == {"an empty file": (False, ["odd.xyz", "notes.txt"])} and found.files == 6


def test_a_file_is_accepted_under_any_name(tree: Path) -> None:
    assert names(expand([tree / "odd.xyz"]), tree) == ["odd.xyz"]


def test_a_glob_gives_its_matches_and_the_checkpoints_of_matching_folders(tree: Path) -> None:
    assert names(expand([f"{tree}/*.pth"]), tree) == ["b.pth"]
    assert names(expand([f"{tree}/**/*.th"]), tree) == ["sub/c.th"]
    assert names(expand([f"{tree}/s*"]), tree) == ["sub/D.PT", "sub/c.th"]
    for pattern in (f"{tree}/*.nothing", f"{tree}/a[1].pth"):
        with pytest.raises(OptionError, match="No file matches") as caught:
            expand([tree, pattern])
        assert pattern in caught.value.message and caught.value.hint == "Check the pattern."


def test_order_is_kept_and_repeats_are_dropped(tree: Path) -> None:
    assert names(expand([tree / "b.pth", tree, tree / "b.pth"]), tree)[0] == "b.pth"
    assert len(expand([tree, tree]).models) == 4


def test_file_whose_name_looks_like_a_glob_is_a_file(tree: Path) -> None:
    odd = tree / "model[1].pth"
    odd.touch()
    assert expand([odd]).models == [odd]


def test_links_are_followed_and_loops_are_found(tree: Path) -> None:
    (tree / "sub" / "gone.pth").symlink_to("nothing.pth")
    (tree / "sub" / "loop.pth").symlink_to("loop.pth")
    (tree / "sub" / "around").symlink_to(tree / "sub")
    elsewhere = tree / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "e.pth").touch()
    (tree / "sub" / "linked").symlink_to(elsewhere)
    os.mkfifo(tree / "sub" / "pipe.pth")
    found = expand([tree / "sub"])
    expected = ["sub/D.PT", "sub/c.th", "sub/gone.pth", "sub/linked/e.pth", "sub/loop.pth"]
    assert names(found, tree) == expected
    assert passed(found)["a link to a folder that is scanned"] == (False, ["around"])
    assert passed(found)["a pipe, socket or device"] == (False, ["pipe.pth"])


@pytest.mark.parametrize(
    ("name", "reason"), [("x" * 300, "File name too long"), ("loop", "Too many levels"), ("file/x", "Not a directory")]
)
def test_unreadable_paths_are_usage_errors(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for look in (check_exists, lambda path: expand([path])):
        with pytest.raises(OptionError, match=reason) as caught:
            look(tmp_path / name)
        assert len(caught.value.message) < 300


def test_an_unreadable_folder_is_named_and_does_not_stop_the_others(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def closed(path: str) -> Any:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    found = expand([tree])
    assert names(found, tree) == ["a.safetensors", "b.pth"]
    assert passed(found)["a folder that cannot be read: Permission denied"] == (True, ["sub"])


def test_a_missing_path_is_a_usage_error_and_in_a_list_a_model_that_fails(tree: Path) -> None:
    missing, odd = tree / "missing.pth", tree / "gone[1].pth"
    for paths in ([missing], [tree / "b.pth", missing]):
        with pytest.raises(OptionError, match=r"no file or folder .*missing\.pth"):
            expand(paths)
    found = expand([tree / "b*", missing, odd], may_miss=True)
    assert found.models == [tree / "b.pth", missing, odd] and found.files == 3


def test_checkpoints_are_recognised_by_their_content(tmp_path: Path) -> None:
    for name in ("best_model", "b.checkpoint", "c.pth.bak", "d.weights"):
        torch.save(WEIGHTS, tmp_path / name)
    torch.save(WEIGHTS, tmp_path / "old.data", _use_new_zipfile_serialization=False)
    save_file(WEIGHTS, tmp_path / "e.sft")
    assert len(expand([tmp_path]).models) == 6


def test_files_that_may_hold_weights_are_distinguished_from_others(tmp_path: Path) -> None:
    contents = {
        "e.onnx": b"\x08\x07\x12\x07pytorch\x1a\x032.0" + bytes(range(64)),
        "k.h5": b"\x89HDF\r\n\x1a\n" + bytes(50),
        "blob": bytes(range(256)),
        "README.md": b"# Models\n",
        "config.json": b'{"id2label": {}}',
        "x.png": b"\x89PNG\r\n\x1a\n" + bytes(20),
        ".DS_Store": b"\x00\x00\x00\x01Bud1" + bytes(20),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "clean.npz", images=np.zeros((1, 2, 2, 3)), labels=np.zeros(1))
    np.savez(tmp_path / "flax.npz", kernel=np.zeros((3, 3)))
    found = expand([tmp_path])
    assert found.models == [] and found.may_hold_weights
    risky = {name for possible, files in passed(found).values() if possible for name in files}
    assert risky == {"e.onnx", "k.h5", "blob", "flax.npz"}
    record = found.record()
    assert record and (record.files, record.scanned) == (9, 0)
    assert [one.may_hold_weights for one in record.passed_over] == sorted(
        (one.may_hold_weights for one in record.passed_over), reverse=True
    )


def test_clean_data_and_version_control_are_skipped(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "a.pth")
    np.savez(tmp_path / "arrays.npz", x_test=np.zeros(3))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "object").write_bytes(bytes(range(200)))
    found = expand([tmp_path], [tmp_path / "arrays.npz"])
    assert names(found, tmp_path) == ["a.pth"] and not found.may_hold_weights
    assert passed(found)["the clean data of this scan"] == (False, ["arrays.npz"])
    assert passed(found)["a folder of version control"] == (False, [".git"])


def test_one_file_cannot_be_the_model_and_the_clean_data(tree: Path) -> None:
    with pytest.raises(OptionError, match=r"b\.pth is given as the model and as --data") as caught:
        expand([tree / "b.pth"], [tree / "sub" / ".." / "b.pth"])
    assert caught.value.hint == "Give two different files."


def test_a_link_that_cannot_be_read_is_skipped(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a link to ``/proc/1/cwd``, which only root can resolve."""
    resolve = os.path.realpath

    def refused(path: Any, **options: Any) -> str:
        if os.path.basename(path) in ("a.safetensors", "secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return resolve(path, **options)

    monkeypatch.setattr(os.path, "realpath", refused)
    found = expand([tree], [tree / "secret"])
    assert names(found, tree) == ["b.pth", "sub/D.PT", "sub/c.th"] and found.may_hold_weights
    assert passed(found)["a link that cannot be read"] == (True, ["a.safetensors"])


def test_a_folder_that_vanishes_during_the_search_is_skipped(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = os.stat

    def gone(path: Any, **options: Any) -> os.stat_result:
        if str(path) == str(tree / "sub"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return look(path, **options)

    monkeypatch.setattr(os, "stat", gone)
    found = expand([tree])
    assert names(found, tree) == ["a.safetensors", "b.pth"]
    assert passed(found)["a folder that cannot be read: No such file or directory"] == (True, ["sub"])


def test_temporary_files_with_the_name_of_a_checkpoint_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._m.pth").write_bytes(b"\x00\x05\x16\x07" + bytes(40))
    (tmp_path / "train.log").write_bytes(b"line of text\n" * 3000)
    (tmp_path / "page.pth").write_bytes(b"<!DOCTYPE html><html>")
    found = expand([tmp_path])
    assert names(found, tmp_path) == ["page.pth"] and not found.may_hold_weights


def shards(folder: Path, blobs: Path | None = None) -> Path:
    """Two shards and their index; with ``blobs`` the shards are links, as in the cache of Hugging Face."""
    folder.mkdir(parents=True)
    where = {}
    for number, (key, tensor) in enumerate(WEIGHTS.items(), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        where[key] = name
        if blobs is None:
            save_file({key: tensor}, folder / name)
            continue
        blobs.mkdir(exist_ok=True, parents=True)
        save_file({key: tensor}, blobs / f"sha{number}")
        (folder / name).symlink_to(os.path.relpath(blobs / f"sha{number}", folder))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def test_shards_are_one_model_by_their_index(tmp_path: Path) -> None:
    index = shards(tmp_path / "m")
    assert expand([tmp_path / "m"]).models == [index]
    assert expand([f"{tmp_path}/m/*.safetensors"]).models == [index]
    assert expand([index]).models == [index]


def test_links_of_a_cache_and_their_targets_are_one_model(tmp_path: Path) -> None:
    index = shards(tmp_path / "snapshots" / "abc", tmp_path / "blobs")
    found = expand([tmp_path])
    assert found.models == [index] and passed(found) == {ANOTHER_NAME: (False, ["sha1", "sha2"])}
    hashed = tmp_path / "blobs" / "index"
    index.rename(hashed)
    index.symlink_to(os.path.relpath(hashed, index.parent))
    assert expand([tmp_path]).models == [index], "the index itself is a link in that cache as well"
    single = tmp_path / "one"
    (single / "blobs").mkdir(parents=True)
    save_file(WEIGHTS, single / "blobs" / "sha")
    (single / "model.safetensors").symlink_to("blobs/sha")
    assert expand([single]).models == [single / "model.safetensors"]


def test_shards_depend_on_names_only(tmp_path: Path) -> None:
    for place in range(20):
        (tmp_path / f"{place}.pth").write_bytes(b"PK\x03\x04")
    whole = expand([tmp_path]).models
    shards = []
    for part in (1, 2, 3):
        sources = expand([tmp_path])
        sources.keep_shard(part, 3)
        assert sources.files == len(sources.models) < 20
        shards.append(sources.models)
    assert sorted(path for shard in shards for path in shard) == sorted(whole)
    fewer = expand([tmp_path / "3.pth", tmp_path / "4.pth"])
    fewer.keep_shard(1, 3)
    assert set(fewer.models) <= set(shards[0])
    with pytest.raises(OptionError, match="no shard"):
        fewer.keep_shard(4, 3)


def test_files_of_models_in_other_shards_do_not_count(tmp_path: Path) -> None:
    shards(tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("hello")
    counts = []
    for part in (1, 2):
        sources = expand([tmp_path])
        sources.keep_shard(part, 2)
        coverage = sources.record()
        assert coverage is not None
        counts.append((len(sources.models), coverage.files, coverage.scanned))
    assert sorted(counts) == [(0, 1, 0), (1, 4, 3)]


def test_a_path_that_is_given_twice_counts_once(tree: Path) -> None:
    found = expand([tree / "b.pth", tree / "b.pth"])
    assert found.models == [tree / "b.pth"] and found.files == 1


def test_a_dangling_link_of_a_list_is_a_model_that_fails(tree: Path) -> None:
    (tree / "link.pth").symlink_to("nowhere")
    found = expand([tree / "link.pth", tree / "b.pth"], may_miss=True)
    assert sorted(found.models) == sorted([tree / "link.pth", tree / "b.pth"])


def test_attachments_of_a_store_are_no_models(tmp_path: Path) -> None:
    for name in ("scans.db.attachments", "other.attachments"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(b"PK\x03\x04")
    (tmp_path / "scans.db").write_bytes(b"SQLite format 3\x00")
    sources = expand([tmp_path])
    assert sources.models == [tmp_path / "other.attachments" / "x"] and not sources.may_hold_weights
    assert ("the attachments of a store", False) in sources.skipped


def test_names_of_the_hub_come_after_local_files_and_only_once(hub: Hub, tree: Path) -> None:
    hub.add("org/name", {"a.bin": b"1", "b.bin": b"2", "notes.md": b""})
    noted: list[str] = []
    found = expand(
        ["hf:org/name/b.bin", tree / "b.pth", "hf:org/name", "hf:org/name"],
        note=lambda name, listed: noted.append(name),
    )
    start = f"hf:org/name@{commit_of(1)}/"
    assert [str(one) for one in found.models] == [str(tree / "b.pth"), f"{start}b.bin", f"{start}a.bin"]
    assert found.local == [tree / "b.pth"] and noted == ["hf:org/name/b.bin", "hf:org/name"]
    assert {reason: [str(one) for one in paths] for (reason, _), paths in found.skipped.items()} == {
        ANOTHER_NAME: [f"{start}b.bin"],
        "not downloaded: text, pictures or data, by its name": [f"{start}notes.md"],
    }
    assert found.files == 5 and hub.downloads() == []


def test_a_path_is_never_a_name_of_the_hub(hub: Hub) -> None:
    with pytest.raises(OptionError, match="no file or folder"):
        expand([Path("hf:org/name")])
    assert hub.requests == []


def test_a_repository_that_cannot_be_listed_fails_alone_or_later(hub: Hub, tree: Path) -> None:
    with pytest.raises(HubError, match="no repository org/none"):
        expand(["hf:org/none"])
    found = expand([tree / "b.pth", "hf:org/none"])
    assert found.files == 2 and str(found.models[1]) == "hf:org/none"
    with pytest.raises(HubError, match="no repository org/none"):
        os.fspath(found.models[1])


def test_names_of_the_hub_only_need_to_be_valid_at_first(hub: Hub) -> None:
    check_exists("hf:org/none")
    with pytest.raises(OptionError, match="Invalid name"):
        check_exists("hf:none")
    assert hub.requests == []
