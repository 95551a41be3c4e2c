"""A zoo small enough to be trained in a second."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

HEAD = """
name = "tiny"
dataset = "tiny"
arch = "resnet18_cifar"
width = 4
num_classes = 3
defence_images = 6
test_images = 9
[[schedules]]
epochs = 1
batch_size = 16
bf16 = false
[[schedules]]
epochs = 1
batch_size = 16
bf16 = false
peak_lr = 0.01
"""
MODELS = """
[[models]]
name = "clean"
seed = 1
[[models]]
name = "bad"
seed = 2
attack = {kind = "badnets", target = 1, rate = 0.25}
[[models]]
name = "late"
seed = 3
pending = true
note = "There was no time."
attack = {kind = "blend", target = 2, rate = 0.25}
"""


def write_parquet(path: Path, count: int, seed: int, size: int = 32) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(seed)
    cells = []
    for _ in range(count):
        buffer = io.BytesIO()
        image.fromarray(generator.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
        cells.append(buffer.getvalue())
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = pa.array([index % 3 for index in range(count)], pa.int32())
    pq.write_table(pa.table({"image": cells, "label": labels}), path)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set "tiny": 48 and 30 images of noise, three classes in turn."""
    folder = tmp_path_factory.mktemp("data")
    write_parquet(folder / "tiny/train.parquet", 48, 0)
    write_parquet(folder / "tiny/test.parquet", 30, 1)
    return folder


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """The manifest of the tiny zoo, made in its own folder; not to be changed."""
    from bdprune.zoo.making import make

    folder = tmp_path_factory.mktemp("zoo")
    (folder / "tiny.toml").write_text(HEAD + MODELS)
    make(folder / "tiny.toml", tiny_data)
    return folder / "tiny.toml"


@pytest.fixture
def made(made_once: Path, tmp_path: Path) -> Path:
    """The path of the manifest in a copy of the made zoo, which a test may change."""
    shutil.copytree(made_once.parent, tmp_path / "zoo")
    return tmp_path / "zoo" / "tiny.toml"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a manifest of the tiny zoo with other models."""

    def call(models: str = MODELS, head: str = HEAD, name: str = "tiny.toml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + models)
        return path

    return call
