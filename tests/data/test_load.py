from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from bdprune.data import load
from bdprune.data.clean import sample_per_class
from bdprune.data.load import load_clean
from bdprune.errors import DataError, OptionError

Encode = Callable[..., bytes]
Tree = Callable[..., Path]


def dataset(labels: list[int], channels: int = 3, size: tuple[int, int] = (2, 2)) -> TensorDataset:
    """Image i is filled with i/255."""
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, channels, *size)
    return TensorDataset(images, torch.tensor(labels, dtype=torch.int64))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=40).filter(lambda labels: len(set(labels)) > 1),
    st.integers(1, 6),
    st.integers(0, 2**32),
)
def test_sampling_before_decoding_equals_sampling_after(labels: list[int], per_class: int, seed: int) -> None:
    before = load_clean(dataset(labels), per_class=per_class, seed=seed)
    whole = load_clean(dataset(labels))
    index = sample_per_class(whole.labels, per_class, torch.Generator().manual_seed(seed)).sort().values
    assert before.labels.tolist() == whole.labels[index].tolist()
    assert torch.equal(before.images, whole.images[index])


def test_a_limit_that_no_class_reaches_changes_nothing() -> None:
    """The command line always has a limit, Python has none: both must get the same images in the same order."""
    data = dataset([2, 0, 1, 0, 2])
    assert load_clean(data, per_class=2, seed=3).digest == load_clean(data).digest


def test_without_a_number_per_class_all_images_are_read_in_order() -> None:
    data = load_clean(dataset([2, 0, 1, 0]))
    assert data.labels.tolist() == [2, 0, 1, 0]
    assert torch.equal(data.images[:, 0, 0, 0] * 255, torch.tensor([0.0, 1, 2, 3]))
    assert data.notes == ()


@pytest.mark.parametrize(
    ("labels", "num_classes", "message"),
    [
        ([], None, "holds 0 images"),
        ([1], None, "holds 1 image\\. Give at least 2 images"),
        ([1, 1, 1], 10, "All 3 images of TensorDataset are of class 1.*at least 2 classes"),
        ([0, 1, 10], 10, "label 10, but the model has classes 0 to 9. Use data of the model's own"),
        ([1, 5, 10], 10, "label 10, .*count from 1: subtract 1"),
        ([5], 5, "label 5, but the model has classes 0 to 4"),
    ],
)
def test_wrong_labels_are_errors(labels: list[int], num_classes: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_clean(dataset(labels), num_classes=num_classes)


@pytest.mark.parametrize("per_class", [0, -3])
def test_per_class_below_one_is_an_error(per_class: int) -> None:
    with pytest.raises(OptionError, match=f"{per_class} images per class"):
        load_clean(dataset([0, 1]), per_class=per_class)


@pytest.mark.parametrize(
    ("channels", "wanted", "message"),
    [
        (1, 3, r"1 channel \(grey\), but the model takes 3 channels \(RGB\)"),
        (3, 1, r"3 channels \(RGB\), but the model takes 1 channel \(grey\)"),
        (4, 3, "have 4 channels, but the model takes 3 channels"),
        (3, 6, "RGB.*, but the model takes 6 channels"),
    ],
)
def test_wrong_channels_are_errors(channels: int, wanted: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_clean(dataset([0, 1], channels), input_shape=(wanted, 2, 2))


def test_a_grey_image_among_colour_ones_is_repeated_and_noted(
    write_tree: Tree, encode: Encode, pixels: np.ndarray, unit: torch.Tensor
) -> None:
    root = write_tree({"a/1.png": encode(pixels[0]), "b/2.png": encode(pixels[1, :, :, 0])})
    for input_shape in (None, (3, 6, 4)):
        data = load_clean(root, input_shape=input_shape)
        assert torch.equal(data.images, torch.stack([unit[0], unit[1, :1].expand(3, 6, 4)]))
        assert data.notes == ("1 grey images among colour images were converted to RGB.",)
    with pytest.raises(DataError, match=r"have 3 channels \(RGB\)"):
        load_clean(root, input_shape=(1, 6, 4))


def test_resizing_is_bilinear_and_noted() -> None:
    ramp = torch.tensor([0.0, 0.25, 0.5, 0.75]).view(1, 1, 1, 4).expand(2, 1, 4, 4)
    data = load_clean(TensorDataset(ramp, torch.tensor([0, 1])), input_shape=(1, 2, 2))
    # Halving with antialiasing: a triangle of radius 2 about each new centre; weights 3, 3, 1 remain inside the image.
    expected = torch.tensor([(3 * 0 + 3 * 0.25 + 0.5) / 7, (0.25 + 3 * 0.5 + 3 * 0.75) / 7])
    assert torch.allclose(data.images, expected.expand(2, 1, 2, 2), atol=1e-6)
    assert data.notes == ("2 images were resized from 4x4 to 2x2 (bilinear).",)


def test_resizing_does_not_change_images_of_the_right_size(
    write_tree: Tree, encode: Encode, pixels: np.ndarray, unit: torch.Tensor
) -> None:
    root = write_tree(
        {"a/1.png": encode(pixels[0]), "b/1.png": encode(pixels[1, :3]), "b/2.png": encode(pixels[2, :5])}
    )
    data = load_clean(root, input_shape=(3, 6, 4))
    assert data.images.shape == (3, 3, 6, 4)
    assert torch.equal(data.images[0], unit[0])
    assert data.notes == ("2 images were resized from 2 other sizes to 6x4 (bilinear).",)


def test_resized_images_stay_in_range() -> None:
    images = (torch.rand(4, 3, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    data = load_clean(TensorDataset(images, torch.tensor([0, 1, 0, 1])), input_shape=(3, 16, 16))
    assert data.images.min() >= 0 and data.images.max() <= 1


def test_different_sizes_without_an_input_shape_name_the_image_that_differs(
    write_tree: Tree, encode: Encode, pixels: np.ndarray
) -> None:
    root = write_tree({"a/1.png": encode(pixels[0]), "b/odd.png": encode(pixels[1, :3])})
    with pytest.raises(DataError, match=r"b/odd\.png is 3x4, but others are 6x4.*one size"):
        load_clean(root)


def test_memory_is_checked_after_the_first_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "MAX_BYTES", 4 * 3 * 2 * 2 * 4 - 1)
    assert len(load_clean(dataset([0, 1, 1]))) == 3
    with pytest.raises(DataError, match=r"GiB of memory.*--per-class"):
        load_clean(dataset([0, 1, 1, 1]))


@pytest.mark.parametrize("name", ["data.txt", "empty.npz", "images.npy"])
def test_other_files_are_errors(tmp_path: Path, name: str) -> None:
    content = {"data.txt": b"hello", "empty.npz": b"", "images.npy": b"\x93NUMPY\x01\x00"}[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} is not clean data.*one sub-folder per class"):
        load_clean(tmp_path / name)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere cannot be read: No such file"):
        load_clean(str(tmp_path / "nowhere"))


def test_a_device_file_is_an_error() -> None:
    with pytest.raises(DataError, match="/dev/zero is neither a file nor a folder"):
        load_clean("/dev/zero")


def test_the_kind_of_a_file_is_recognised_by_its_content(
    tmp_path: Path, pixels: np.ndarray, labels: np.ndarray
) -> None:
    with (tmp_path / "defence").open("wb") as file:
        np.savez(file, images=pixels, labels=labels)
    assert len(load_clean(tmp_path / "defence")) == 8
