"""Checkpoints published by others load, and classify a recorded number of every eighth test image correctly; with
all images, the same weights reach the stated accuracy."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bdprune.data.parquet import ParquetSource
from bdprune.model.handle import Model, Normalization
from bdprune.model.loading import load
from bdprune.model.saving import save

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CHECKPOINTS = {
    "ibau-cifar10-badnets-target8.pth": ("ibau_cnn", 10, "net", ""),
    "ibau-cifar10-trojanwm-target2.pth": ("ibau_cnn", 10, "net", ""),
    "ibau-gtsrb-badnets-target8.pth": ("ibau_cnn", 43, "net", ""),
    "akamaster-resnet20-clean.th": ("resnet20_cifar", 10, "state_dict", "module."),
    "akamaster-resnet56-clean.th": ("resnet56_cifar", 10, "state_dict", "module."),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_recognised_and_saved_back_unchanged(data_root: Path, tmp_path: Path, name: str) -> None:
    path = data_root / "checkpoints" / name
    model = load(path)
    assert model.artifact is not None
    found = (model.arch, model.num_classes, model.artifact.state_key, model.artifact.prefix)
    assert found == CHECKPOINTS[name] and model.input_shape == (3, 32, 32)
    assert all(group.norm for group in model.groups)
    save(model, tmp_path / name)
    original, copy = (torch.load(file, map_location="cpu", weights_only=True) for file in (path, tmp_path / name))
    key = model.artifact.state_key
    assert original.keys() == copy.keys() and list(original[key]) == list(copy[key])
    assert all(torch.equal(original[key][entry], copy[key][entry]) for entry in original[key])


EVERY = 8
"""Tests classify one image of this many, because all of them take minutes."""


@pytest.fixture(scope="module")
def cifar10(data_root: Path) -> tuple[Tensor, Tensor]:
    """Every eighth image of the test set, uint8 ``[1250, 3, 32, 32]``, and the labels."""
    source = ParquetSource(data_root / "cifar10" / "test.parquet")
    rows = range(0, len(source.labels), EVERY)
    images = [image for _, image in sorted(source.read(rows), key=lambda pair: pair[0])]
    return torch.stack(images), source.labels[::EVERY]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "normalize", "correct"),
    [
        ("ibau-cifar10-badnets-target8.pth", None, 1087),  # 8446 of all 10,000
        ("ibau-cifar10-trojanwm-target2.pth", None, 1088),  # 8502
        ("akamaster-resnet20-clean.th", IMAGENET, 1141),  # 9173
        ("akamaster-resnet56-clean.th", IMAGENET, 1166),  # 9339
    ],
)
def test_the_accuracy_on_cifar10_is_the_recorded_one(
    data_root: Path, cifar10: tuple[Tensor, Tensor], name: str, normalize: Normalization | None, correct: int
) -> None:
    model = load(data_root / "checkpoints" / name, normalize=normalize)
    assert abs(count_correct(model, *cifar10) - correct) <= 1  # one image may sit on a boundary


@pytest.mark.slow
def test_the_accuracy_on_gtsrb_sign_crops_is_the_recorded_one(data_root: Path) -> None:
    images, labels = sign_crops(data_root / "gtsrb" / "test.parquet")
    model = load(data_root / "checkpoints" / "ibau-gtsrb-badnets-target8.pth")
    assert abs(count_correct(model, images, labels) - 1540) <= 1  # 97.53 %; of all 12,630 signs it is 97.29 %


@torch.no_grad()
def count_correct(model: Model, images: Tensor, labels: Tensor) -> int:
    module = model.module
    batches = zip(images.split(500), labels.split(500), strict=True)
    return sum(int((module(x.float() / 255).argmax(1) == y).sum()) for x, y in batches)


def sign_crops(path: Path) -> tuple[Tensor, Tensor]:
    """Uint8 images ``[N, 3, 32, 32]`` of every eighth sign, cropped as in the notes of the data, and the labels."""
    parquet = pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    table = parquet.read_table(path)
    rows = table.take(list(range(0, len(table), EVERY))).to_pylist()
    crops = []
    for row in rows:
        content = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
        whole = image.open(io.BytesIO(content)).convert("RGB")
        x, y = 32 / row["width"], 32 / row["height"]
        box = (row["roi_x1"] * x, row["roi_y1"] * y, (row["roi_x2"] + 1) * x, (row["roi_y2"] + 1) * y)
        crops.append(np.asarray(whole.resize((32, 32), image.Resampling.BILINEAR, box)))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2), torch.tensor([row["label"] for row in rows])
