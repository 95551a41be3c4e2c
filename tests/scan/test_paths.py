"""Which files a PATH stands for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bdprune.errors import OptionError
from bdprune.scan.paths import check_exists, expand


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.pth", "a.safetensors", "sub/c.th", "sub/D.PT", "sub/notes.txt", "odd.xyz"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def names(paths: list[Path], tree: Path) -> list[str]:
    return [str(path.relative_to(tree)) for path in paths]


def test_folder_stands_for_its_checkpoints_sorted(tree: Path) -> None:
    assert names(expand([tree]), tree) == ["a.safetensors", "b.pth", "sub/D.PT", "sub/c.th"]


def test_file_is_taken_whatever_its_name(tree: Path) -> None:
    assert names(expand([tree / "odd.xyz"]), tree) == ["odd.xyz"]


def test_glob_gives_its_matches_and_folders_among_them_their_checkpoints(tree: Path) -> None:
    assert names(expand([f"{tree}/*.pth"]), tree) == ["b.pth"]
    assert names(expand([f"{tree}/**/*.th"]), tree) == ["sub/c.th"]
    assert names(expand([f"{tree}/s*"]), tree) == ["sub/D.PT", "sub/c.th"]
    assert expand([f"{tree}/*.nothing"]) == []


def test_order_is_kept_and_repeats_are_dropped(tree: Path) -> None:
    assert names(expand([tree / "b.pth", tree, tree / "b.pth"]), tree)[0] == "b.pth"
    assert len(expand([tree, tree])) == 4


def test_file_whose_name_looks_like_a_glob_is_a_file(tree: Path) -> None:
    odd = tree / "model[1].pth"
    odd.touch()
    assert expand([odd]) == [odd]


def test_links_that_lead_nowhere_and_pipes_do_not_go_unnoticed(tree: Path) -> None:
    (tree / "sub" / "gone.pth").symlink_to("nothing.pth")
    (tree / "sub" / "loop.pth").symlink_to("loop.pth")
    (tree / "sub" / "around").symlink_to(tree)
    os.mkfifo(tree / "sub" / "pipe.pth")
    found = ["sub/D.PT", "sub/c.th", "sub/gone.pth", "sub/loop.pth", "sub/pipe.pth"]
    assert names(expand([tree / "sub"]), tree) == found


@pytest.mark.parametrize(
    ("name", "reason"), [("x" * 300, "File name too long"), ("loop", "Too many levels"), ("file/x", "Not a directory")]
)
def test_what_cannot_be_looked_at_is_a_usage_error(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for look in (check_exists, lambda path: expand([path])):
        with pytest.raises(OptionError, match=reason) as caught:
            look(tmp_path / name)
        assert len(caught.value.message) < 300


def test_folder_that_cannot_be_read_is_a_usage_error(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def closed(path: str) -> Any:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(OptionError, match=r"sub' cannot be read: Permission denied"):
        expand([tree])


def test_what_does_not_exist_is_a_usage_error(tree: Path) -> None:
    with pytest.raises(OptionError, match=r"no file or folder .*missing\.pth"):
        expand([tree / "b.pth", tree / "missing.pth"])
