from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bdprune.data.load import load_clean
from bdprune.errors import DataError

Tree = Callable[..., Path]
Encode = Callable[..., bytes]


def test_names_are_labels_in_sorted_order(
    write_tree: Tree, encode: Encode, pixels: np.ndarray, unit: torch.Tensor
) -> None:
    root = write_tree(
        {"dog/b.png": encode(pixels[2]), "cat/1.png": encode(pixels[0]), "dog/a.webp": encode(pixels[1], kind="BMP")}
    )
    data = load_clean(root)
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 1, 1]
    assert torch.equal(data.images, unit[[0, 1, 2]])
    assert data.source == str(root)


def test_whole_numbers_are_the_labels_themselves(write_tree: Tree, encode: Encode, pixels: np.ndarray) -> None:
    root = write_tree({f"{name}/x.png": encode(pixels[0]) for name in ("10", "2", "007")})
    data = load_clean(root, num_classes=43)
    assert data.labels.tolist() == [7, 10, 2]
    assert data.class_names == ()


def test_hidden_and_foreign_files_are_passed_over(write_tree: Tree, encode: Encode, pixels: np.ndarray) -> None:
    image = encode(pixels[0])
    root = write_tree(
        {
            "a/1.PNG": image,
            "a/.2.png": image,
            "a/notes.txt": b"",
            "a/.thumbs/3.png": image,
            "b/deep/er/4.jpeg": encode(pixels[1], kind="JPEG"),
            ".git/5.png": image,
            "readme.md": b"",
        }
    )
    assert load_clean(root).class_counts == {0: 1, 1: 1}


def test_a_pipe_named_like_an_image_is_not_opened(write_tree: Tree, encode: Encode, pixels: np.ndarray) -> None:
    root = write_tree({"a/1.png": encode(pixels[0]), "b/1.png": encode(pixels[1])})
    os.mkfifo(root / "a" / "2.png")
    assert len(load_clean(root)) == 2


def test_an_empty_folder_keeps_its_place(write_tree: Tree, encode: Encode, pixels: np.ndarray) -> None:
    root = write_tree({"a/1.png": encode(pixels[0]), "c/1.png": encode(pixels[1])})
    (root / "b").mkdir()
    assert load_clean(root, num_classes=3).labels.tolist() == [0, 2]


def test_missing_class_folders_are_an_error(write_tree: Tree, encode: Encode, pixels: np.ndarray) -> None:
    root = write_tree({"a/1.png": encode(pixels[0]), "c/1.png": encode(pixels[1])})
    with pytest.raises(DataError, match=r"names 2 classes, the model has 3.*empty folder"):
        load_clean(root, num_classes=3)


def test_a_damaged_file_is_named(write_tree: Tree, encode: Encode, pixels: np.ndarray) -> None:
    root = write_tree({"a/1.png": encode(pixels[0]), "b/broken.png": encode(pixels[1])[:60]})
    with pytest.raises(DataError, match=r"b/broken\.png cannot be decoded"):
        load_clean(root)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds nothing but no class folders"),
        ({"1.png": b"", "2.png": b""}, "holds 2 other entries but no class folders.*one sub-folder per class"),
        ({"a/readme.txt": b""}, "holds 0 images"),
        ({"1/x.png": b"", "01/x.png": b""}, "Two class folders mean label 1"),
        ({"9999999/x.png": b""}, "too large for a label"),
        ({"9" * 200 + "/x.png": b""}, "too large for a label"),
    ],
)
def test_trees_that_are_none(write_tree: Tree, tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    (tmp_path / "tree").mkdir()
    with pytest.raises(DataError, match=message):
        load_clean(write_tree(files))


def test_unreadable_root(write_tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tree({"a/1.png": b""})

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"tree cannot be read: Permission denied.*permissions"):
        load_clean(root)


def test_unreadable_class_folder(write_tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root, real = write_tree({"a/1.png": b"", "b/2.png": b""}), os.scandir

    def refuse(path: str | Path) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="b cannot be read: Permission denied"):
        load_clean(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_folder_for_real(write_tree: Tree) -> None:
    root = write_tree({"a/1.png": b""})
    root.chmod(0)
    try:
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            load_clean(root)
    finally:
        root.chmod(0o700)


def test_file_that_vanishes(write_tree: Tree, encode: Encode, pixels: np.ndarray, tmp_path: Path) -> None:
    from bdprune.data.folder import FolderSource

    root = write_tree({"a/1.png": encode(pixels[0])})
    source = FolderSource(root)
    (root / "a" / "1.png").unlink()
    with pytest.raises(DataError, match=r"a/1\.png cannot be read: No such file"):
        next(source.read([0]))


def test_control_characters_in_folder_names_do_not_reach_the_report(
    write_tree: Tree, encode: Encode, pixels: np.ndarray
) -> None:
    root = write_tree({"a\x1b[31m/1.png": encode(pixels[0]), "b\n/1.png": encode(pixels[1])})
    assert load_clean(root).class_names == ("a[31m", "b")
