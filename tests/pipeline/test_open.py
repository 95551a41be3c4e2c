"""The clean data of a run: size, order of classes, and their record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bdprune.analysis.sanity import check_sanity
from bdprune.data.clean import CleanData
from bdprune.data.load import load_clean
from bdprune.errors import DataError, OptionError
from bdprune.model.handle import Model
from bdprune.pipeline import CleanSource, Options, options_from
from bdprune.pipeline import open as open_module
from bdprune.pipeline.describe import data_info

CLASSES = 12


class Counts(nn.Module):
    """The label is the number of white pixels, which resizing blurs."""

    def __init__(self, divisor: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.divisor = divisor

    def forward(self, x: Tensor) -> Tensor:
        white = (x[:, 0] > 0.95).sum((1, 2)) // self.divisor
        return nn.functional.one_hot(white.clamp(max=CLASSES - 1), CLASSES).float() * self.scale


def counted(side: int = 8, count: int = 72) -> tuple[np.ndarray, np.ndarray]:
    """uint8 ``[N, side, side, 3]`` with one white pixel for each unit of the label, no two adjacent.

    The last pixel differs from image to image.
    """
    labels = np.arange(count) % CLASSES
    pixels = np.zeros((count, side * side, 3), dtype=np.uint8)
    for row, label in zip(pixels, labels, strict=True):
        row[2 * np.arange(label)] = 255
    pixels[:, -1] = np.arange(count)[:, None]
    return pixels.reshape(count, side, side, 3), labels


def model(side: int, channels: int = 3) -> Model:
    return Model(Counts().eval(), "counts", CLASSES, (channels, side, side))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    images, labels = counted()
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    return tmp_path / "data.npz"


def in_memory() -> CleanData:
    images, labels = counted()
    return CleanData(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))


@pytest.mark.parametrize("own", [4, 16])
def test_images_of_every_source_keep_their_size_if_it_fits_better(archive: Path, own: int) -> None:
    images, labels = counted()
    pairs = TensorDataset(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels))
    for source in (archive, pairs, in_memory()):
        taken, data = CleanSource(source).fit_for(model(own))
        assert data is not None and taken.input_shape == (3, 8, 8) == tuple(data.images.shape[1:])
        assert check_sanity(taken, data).accuracy == 1.0
        assert "clean accuracy 100.0 %, " in data.notes[-1] and f"resized to {own}x{own}" in data.notes[-1]
        assert data_info(data).notes == data.notes


@pytest.mark.parametrize("make", [lambda path: path, lambda path: in_memory()])
def test_a_fixed_size_is_kept_and_the_remedy_is_named(archive: Path, make: Any) -> None:
    taken, data = CleanSource(make(archive), Options(input_shape=(3, 4, 4))).fit_for(model(4))
    assert data is not None and taken.input_shape == (3, 4, 4) == tuple(data.images.shape[1:])
    assert data.notes[0] == "72 images were resized from 8x8 to 4x4 (bilinear)."
    found = check_sanity(taken, data)
    assert (found.ok, found.suggestion) == (False, "Pass --input-shape 3x8x8.")


def test_files_are_read_once_for_each_size(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int, int]] = []

    def counting(*args: Any, **settings: Any) -> CleanData:
        reads.append(settings["input_shape"])
        return load_clean(*args, **settings)

    monkeypatch.setattr("bdprune.pipeline.open.load_clean", counting)
    clean_source = CleanSource(archive)
    for side in (4, 8, 4, 16):
        assert clean_source.fit_for(model(side))[0].input_shape == (3, 8, 8)
    assert reads == [(3, 4, 4), (3, 8, 8), (3, 16, 16)]


def test_without_data_the_model_is_unchanged() -> None:
    given = model(4)
    assert CleanSource(None).fit_for(given) == (given, None)


def test_mixed_sizes_are_resized_and_noted() -> None:
    items = [(torch.rand(3, 8 + label % 2, 8), label % 3) for label in range(6)]
    taken, data = CleanSource(items).fit_for(model(4))  # type: ignore[arg-type]
    assert taken.input_shape == (3, 4, 4)
    assert data is not None and data.notes == ("6 images were resized from 2 other sizes to 4x4 (bilinear).",)


@pytest.mark.parametrize(("found", "wanted"), [(1, 3), (3, 1)])
def test_other_channels_are_an_error_from_every_source(tmp_path: Path, found: int, wanted: int) -> None:
    images, labels = counted()
    grey = images[..., :found] if found == 3 else images[..., 0]
    np.savez(tmp_path / "data.npz", images=grey, labels=labels)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)[:, :found]
    names = {1: r"1 channel \(grey\)", 3: r"3 channels \(RGB\)"}
    for source in (tmp_path / "data.npz", CleanData(tensor, torch.from_numpy(labels))):
        with pytest.raises(DataError, match=f"{names[found]}, but the model takes {names[wanted]}.*convert them"):
            CleanSource(source).fit_for(model(8, wanted))


@pytest.mark.parametrize("make", [lambda path: path, lambda path: in_memory()])
def test_the_order_of_classes_reaches_every_source(archive: Path, make: Any) -> None:
    _, data = CleanSource(make(archive), Options(class_order="text")).fit_for(model(8))
    assert data is not None and data.labels[:4].tolist() == [0, 1, 4, 5]
    assert "renumbered by the text order" in data.notes[0]


def test_an_invalid_order_is_an_error_before_any_model() -> None:
    with pytest.raises(OptionError, match="no-such-file"):
        CleanSource(in_memory(), Options(class_order="no-such-file.json"))


def test_the_record_has_the_class_order_and_skipped_files() -> None:
    clean = in_memory()
    mixed = CleanData(clean.images, 11 - clean.labels, passed_over={".txt": 2})
    taken, data = CleanSource(mixed).fit_for(model(8))
    assert data is not None
    info = data_info(data, check_sanity(taken, data))
    assert info.passed_over == {".txt": 2}
    assert info.sanity is not None and info.sanity.class_map == {label: 11 - label for label in range(12)}
    assert list(info.sanity.class_map) == sorted(info.sanity.class_map)


def test_images_of_size_zero_are_errors() -> None:
    with pytest.raises(DataError, match=r"have shape \(4, 3, 0, 8\)"):
        CleanSource(CleanData(torch.rand(4, 3, 0, 8), torch.arange(4))).fit_for(model(8))
    with pytest.raises(DataError, match=r"have shape \(4, 8, 8\)"):
        CleanSource(CleanData(torch.rand(4, 8, 8), torch.arange(4))).fit_for(model(8))


def test_options_accept_the_syntax_of_the_command_line() -> None:
    assert Options(input_shape="3x8x6").input_shape == (3, 8, 6)  # type: ignore[arg-type]
    taken = Options(normalize=[0.5, 0.25]).normalization()  # type: ignore[arg-type]
    assert taken is not None and (taken.mean, taken.std) == ((0.5,), (0.25,))
    with pytest.raises(OptionError, match="Invalid input shape"):
        Options(input_shape="32")  # type: ignore[arg-type]
    for seed in (-1, 1 << 63, 1.5, "0"):
        with pytest.raises(OptionError, match="Invalid seed"):
            Options(seed=seed)  # type: ignore[arg-type]


def test_the_seed_draws_the_images_of_each_class() -> None:
    noise = CleanData(torch.rand(72, 3, 8, 8), torch.arange(72) % CLASSES)
    drawn = [CleanSource(noise, Options(per_class=2, seed=seed)).fit_for(model(8))[1] for seed in (1, 1, 2)]
    one, again, other = [data.digest for data in drawn if data is not None]
    assert one == again != other


def test_unknown_options_are_errors() -> None:
    with pytest.raises(TypeError, match=r"purify\(\) got an unexpected keyword argument: color, colour"):
        options_from({"colour": "red", "color": "red", "seed": 1}, "purify")
    assert options_from({"seed": 1}, "purify") == Options(seed=1)


def test_a_limit_that_no_class_reaches_keeps_the_order_of_the_images() -> None:
    noise = CleanData(torch.rand(6, 3, 8, 8), torch.tensor([2, 0, 1, 0, 2, 1]), source="noise")
    limited = CleanSource(noise, Options(per_class=2)).fit_for(model(8))[1]
    whole = CleanSource(noise, Options()).fit_for(model(8))[1]
    assert limited is not None and whole is not None and limited.digest == whole.digest


def test_copies_of_images_are_left_out_for_every_source(tmp_path: Path) -> None:
    images, labels = counted()
    np.savez(tmp_path / "twice.npz", images=np.concatenate([images, images]), labels=np.concatenate([labels, labels]))
    both = load_clean(tmp_path / "twice.npz")
    for source in (tmp_path / "twice.npz", both):
        _, data = CleanSource(source).fit_for(model(8))
        assert data and len(data) == 72 and "72 of 144 images are copies" in data.notes[-1]


def test_sizes_are_compared_on_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that differ may be equal in a smaller size, so leaving copies out there would pair other images."""
    images, labels = counted()
    np.savez(tmp_path / "twice.npz", images=np.concatenate([images, images]), labels=np.concatenate([labels, labels]))
    sizes: list[int] = []

    def compared(model: Model, resized: CleanData, native: Any, **more: Any) -> tuple[Model, CleanData]:
        sizes.extend([len(resized), len(native((8, 8)))])
        return model, resized

    monkeypatch.setattr(open_module, "fit_size", compared)
    _, data = CleanSource(tmp_path / "twice.npz").fit_for(model(4))
    assert sizes == [144, 144] and data and len(data) == 72
