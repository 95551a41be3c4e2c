"""Which files a PATH stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdprune.errors import OptionError
from bdprune.scan.paths import expand


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


def test_what_does_not_exist_is_a_usage_error(tree: Path) -> None:
    with pytest.raises(OptionError, match=r"no file or folder .*missing\.pth"):
        expand([tree / "b.pth", tree / "missing.pth"])
