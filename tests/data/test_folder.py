from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bdprune.data import tree
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


def test_folders_named_by_whole_numbers_have_these_labels(write_tree: Tree, encode: Encode, pixels: np.ndarray) -> None:
    root = write_tree({f"{name}/x.png": encode(pixels[0]) for name in ("10", "2", "007")})
    data = load_clean(root, num_classes=43)
    assert data.labels.tolist() == [7, 10, 2]
    assert data.class_names == ()


def test_hidden_and_unrelated_files_are_skipped(write_tree: Tree, encode: Encode, pixels: np.ndarray) -> None:
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
    data = load_clean(root)
    assert data.class_counts == {0: 1, 1: 1}
    assert data.passed_over == {"hidden": 3, ".txt": 1, ".md": 1}
    assert data.notes == ("Skipped in the folder: 3 hidden, 1 .md, 1 .txt.",)


def test_folders_and_files_of_operating_systems_are_skipped(
    write_tree: Tree, encode: Encode, pixels: np.ndarray
) -> None:
    image = encode(pixels[0])
    left = ("__MACOSX/a/._1.png", "@eaDir/1.png", "lost+found/1.png", "$RECYCLE.BIN/1.png", "a/__pycache__/1.png")
    files = ("a/._1.png", "a/Thumbs.db", "a/desktop.ini", "b/.DS_Store", "System Volume Information/1.png")
    root = write_tree({"a/1.png": image, "b/1.png": image} | dict.fromkeys((*left, *files), image))
    data = load_clean(root, num_classes=2)
    assert data.class_names == ("a", "b") and len(data) == 2
    assert data.passed_over == {"leftover": 10}


def test_formats_of_photo_collections_are_read(
    write_tree: Tree, encode: Encode, pixels: np.ndarray, unit: torch.Tensor
) -> None:
    root = write_tree(
        {
            "a/1.ppm": encode(pixels[0], kind="PPM"),
            "a/2.TIF": encode(pixels[1], kind="TIFF"),
            "b/3.tga": encode(pixels[2], kind="TGA"),
        }
    )
    data = load_clean(root)
    assert torch.equal(data.images, unit[:3]) and data.notes == ()


def test_images_are_recognised_by_their_first_bytes(
    write_tree: Tree, encode: Encode, pixels: np.ndarray, unit: torch.Tensor
) -> None:
    root = write_tree(
        {
            "a/00017": encode(pixels[0]),
            "a/x.png~": encode(pixels[1]),
            "a/z.bak": b"PNG?",
            "b/y.dat": encode(pixels[2], kind="PPM"),
            "b/zz": b"",
        }
    )
    data = load_clean(root)
    assert torch.equal(data.images, unit[:3]) and data.labels.tolist() == [0, 0, 1]
    assert data.passed_over == {".bak": 1, "(no suffix)": 1}


def test_links_inside_classes_are_followed(
    write_tree: Tree, encode: Encode, pixels: np.ndarray, unit: torch.Tensor, tmp_path: Path
) -> None:
    write_tree({f"{index}.png": encode(pixels[index]) for index in range(3)}, "store/part")
    root = write_tree({"a/x.txt": b"", "b/y.txt": b""})
    (root / "a" / "part").symlink_to("../../store/part")
    (root / "b" / "2.png").symlink_to(tmp_path / "store" / "part" / "2.png")
    data = load_clean(root)
    assert torch.equal(data.images, unit[[0, 1, 2, 2]]) and data.labels.tolist() == [0, 0, 0, 1]


def test_loops_of_links_end_and_are_named(write_tree: Tree, encode: Encode, pixels: np.ndarray) -> None:
    root = write_tree({"a/deep/1.png": encode(pixels[0]), "b/2.png": encode(pixels[1])})
    (root / "a" / "deep" / "again").symlink_to("../../a")
    (root / "b" / "up").symlink_to("../..")
    (root / "b" / "gone.png").symlink_to("nowhere.png")
    (root / "b" / "self.png").symlink_to("self.png")
    (root / "c").symlink_to(".")
    data = load_clean(root)
    assert data.class_counts == {0: 1, 1: 1} and data.class_names == ("a", "b")
    assert data.passed_over == {"link to a folder read before": 3, "broken link": 2}
    assert "The link c and 2 other links lead back to a folder that was read before" in data.notes[1]


def test_many_links_to_one_folder_do_not_multiply(write_tree: Tree, encode: Encode, pixels: np.ndarray) -> None:
    """Folder i has two links to folder i + 1, which gives 2 to the 20th paths."""
    root = write_tree(
        {"a/x/1.png": encode(pixels[0]), "b/2.png": encode(pixels[1]), "chain/20/3.png": encode(pixels[2])}
    )
    (root / "chain").rename(root.parent / "chain")
    for step in range(20):
        folder = root.parent / "chain" / str(step)
        folder.mkdir()
        (folder / "p").symlink_to(f"../{step + 1}")
        (folder / "q").symlink_to(f"../{step + 1}")
    (root / "a" / "chain").symlink_to("../../chain/0")
    data = load_clean(root)
    assert data.class_counts == {0: 2, 1: 1} and data.passed_over == {"link to a folder read before": 20}


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"b/1.heic": b"x", "b/2.heic": b"x", "b/note.txt": b""}, r"3 files .*: 2 \.heic, 1 \.txt"),
        ({"b/deep/1.eps": b"%!PS-Adobe"}, r"1 file .*: 1 \.eps"),
    ],
)
def test_a_class_that_loses_all_its_files_is_an_error(
    write_tree: Tree, encode: Encode, pixels: np.ndarray, files: dict[str, bytes], found: str
) -> None:
    root = write_tree({"a/1.png": encode(pixels[0]), "c/1.png": encode(pixels[1])} | files)
    with pytest.raises(DataError, match=rf"class folder .*/b holds {found}.*Convert"):
        load_clean(root)


def test_a_class_of_broken_links_is_an_error(write_tree: Tree, encode: Encode, pixels: np.ndarray) -> None:
    root = write_tree({"a/1.png": encode(pixels[0]), "c/1.png": encode(pixels[1])})
    (root / "b").mkdir()
    (root / "b" / "1.png").symlink_to("/nowhere/1.png")
    with pytest.raises(DataError, match="/b holds 1 file but no image that can be read: 1 broken link"):
        load_clean(root)


def test_a_folder_with_too_many_files_is_an_error(
    write_tree: Tree, encode: Encode, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_tree({f"a/{index}/1.png": encode(pixels[0]) for index in range(4)})
    monkeypatch.setattr(tree, "MAX_IMAGES", 6)
    with pytest.raises(DataError, match="a holds more than 6 files"):
        load_clean(root)


def test_a_pipe_named_like_an_image_is_not_opened(write_tree: Tree, encode: Encode, pixels: np.ndarray) -> None:
    root = write_tree({"a/1.png": encode(pixels[0]), "b/1.png": encode(pixels[1])})
    os.mkfifo(root / "a" / "2.png")
    data = load_clean(root)
    assert len(data) == 2 and data.passed_over == {"not a file": 1}


def test_an_empty_folder_keeps_its_label(write_tree: Tree, encode: Encode, pixels: np.ndarray) -> None:
    root = write_tree({"a/1.png": encode(pixels[0]), "c/1.png": encode(pixels[1])})
    (root / "b").mkdir()
    assert load_clean(root, num_classes=3).labels.tolist() == [0, 2]


def test_missing_class_folders_are_an_error(write_tree: Tree, encode: Encode, pixels: np.ndarray) -> None:
    root = write_tree({"a/1.png": encode(pixels[0]), "c/1.png": encode(pixels[1])})
    with pytest.raises(DataError, match=r"has 2 classes, but the model has 3.*empty folder"):
        load_clean(root, num_classes=3)


def test_a_damaged_file_is_named(write_tree: Tree, encode: Encode, pixels: np.ndarray) -> None:
    root = write_tree({"a/1.png": encode(pixels[0]), "b/broken.png": encode(pixels[1])[:60]})
    with pytest.raises(DataError, match=r"b/broken\.png cannot be decoded"):
        load_clean(root)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.png": b""}, "only 1 other entry"),
        ({}, r"is empty\."),
        ({"1.png": b"", "2.png": b""}, "has no class folders, only 2 other entries.*one sub-folder per class"),
        ({"a/.gitkeep": b""}, "holds 0 images"),
        ({"__MACOSX/1.png": b"", ".git/1.png": b""}, "no class folders, only 2 other entries"),
        ({"1/x.png": b"", "01/x.png": b""}, "Two class folders have label 1"),
        ({"9999999/x.png": b""}, "too large for a label"),
        ({"9" * 200 + "/x.png": b""}, "too large for a label"),
    ],
)
def test_invalid_folders_are_errors(write_tree: Tree, tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    (tmp_path / "tree").mkdir()
    with pytest.raises(DataError, match=message):
        load_clean(write_tree(files))


def test_an_unreadable_root_is_an_error(write_tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tree({"a/1.png": b""})

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"tree cannot be read: Permission denied.*permissions"):
        load_clean(root)


def test_an_unreadable_class_folder_is_an_error(write_tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root, real = write_tree({"a/1.png": b"", "b/2.png": b""}), os.scandir

    def refuse(path: str | Path) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="b cannot be read: Permission denied"):
        load_clean(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_folder_on_disk_is_an_error(write_tree: Tree) -> None:
    root = write_tree({"a/1.png": b""})
    root.chmod(0)
    try:
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            load_clean(root)
    finally:
        root.chmod(0o700)


def test_a_file_that_vanishes_is_an_error(write_tree: Tree, encode: Encode, pixels: np.ndarray, tmp_path: Path) -> None:
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


def test_converted_images_are_counted(tmp_path: Path) -> None:
    from PIL import Image

    for label, mode in enumerate(("P", "CMYK", "RGBA", "RGB")):
        (tmp_path / str(label)).mkdir()
        image = Image.new("RGB", (4, 4), (10 * label, 50, 90)).convert(mode)
        image.save(tmp_path / str(label) / f"x.{'tiff' if mode == 'CMYK' else 'png'}")
    notes = load_clean(tmp_path).notes
    assert notes == ("3 images were converted to grey or RGB from palettes, CMYK, opaque alpha.",)
