"""The published data sets, through the public readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bdprune.data.datasets import PUBLISHED
from bdprune.data.load import load_clean
from bdprune.data.parquet import ParquetSource

CIFAR = {
    "train": (50_000, "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a"),
    "test": (10_000, "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04"),
}
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.mark.parametrize("part", CIFAR)
def test_cifar10_matches_the_published_set(data_root: Path, part: str) -> None:
    """``test_datasets.py`` reads both files and compares all pixels with this digest."""
    count, digest = CIFAR[part]
    source = ParquetSource(data_root / "cifar10" / f"{part}.parquet")
    assert PUBLISHED["cifar10"].parts[part].images == digest  # type: ignore[index]
    assert torch.bincount(source.labels).tolist() == [count // 10] * 10
    assert source.class_names == CIFAR_CLASSES


@pytest.mark.parametrize(
    ("path", "count", "classes", "named"),
    [
        ("gtsrb/train.parquet", 39_209, 43, False),
        ("gtsrb/test.parquet", 12_630, 43, False),
        ("imagenet12/train.parquet", 11_330, 12, True),
        ("imagenet12/test.parquet", 1_200, 12, True),
    ],
)
def test_counts_and_classes(data_root: Path, path: str, count: int, classes: int, named: bool) -> None:
    source = ParquetSource(data_root / path)
    assert len(source.labels) == count
    assert torch.unique(source.labels).tolist() == list(range(classes))
    assert len(source.class_names) == (classes if named else 0)


@pytest.mark.parametrize(("name", "shape", "classes"), [("gtsrb", (3, 32, 32), 43), ("imagenet12", (3, 64, 64), 12)])
def test_a_sample_of_each_class_is_read(data_root: Path, name: str, shape: tuple[int, int, int], classes: int) -> None:
    data = load_clean(data_root / name / "test.parquet", per_class=2, seed=7, input_shape=shape, num_classes=classes)
    assert data.class_counts == dict.fromkeys(range(classes), 2)
    assert data.images.shape == (2 * classes, *shape)
    assert data.images.min() >= 0 and data.images.max() <= 1 and data.images.std() > 0.1
    assert data.notes == ()


def test_all_kinds_of_sources_give_the_same_data(data_root: Path, tmp_path: Path) -> None:
    source = ParquetSource(data_root / "cifar10" / "test.parquet")
    rows = [int(row) for label in range(10) for row in (source.labels == label).nonzero()[:3]]
    images = [image for _, image in sorted(source.read(rows), key=lambda pair: pair[0])]
    labels = source.labels[rows]
    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    for number, (array, label) in enumerate(zip(arrays, labels.tolist(), strict=True)):
        folder = tmp_path / "tree" / CIFAR_CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / f"{number:03}.png")
    np.savez(tmp_path / "a.npz", images=np.stack(arrays), labels=labels.numpy())
    dataset = torch.utils.data.TensorDataset(torch.stack(images), labels)
    loaded = [
        load_clean(given, input_shape=(3, 32, 32), num_classes=10)
        for given in (tmp_path / "tree", tmp_path / "a.npz", dataset)
    ]
    assert len({data.digest for data in loaded}) == 1
    assert loaded[0].labels.tolist() == labels.tolist()
