import io
from pathlib import Path

import numpy as np
import pytest
import torch

from bdprune.attacks.badnets import BadNets
from bdprune.data.load import load_clean
from bdprune.data.parquet import RawImages
from bdprune.errors import DataError, OptionError
from bdprune.model.load import load
from bdprune.zoo.make import make, poisoned
from bdprune.zoo.store import read_truth

MANIFEST = """
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
[[models]]
name = "clean"
seed = 1
[[models]]
name = "bad"
seed = 2
attack = {kind = "badnets", target = 1, rate = 0.25}
"""


def write_parquet(path: Path, count: int, seed: int) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(seed)
    cells = []
    for _ in range(count):
        buffer = io.BytesIO()
        image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        cells.append(buffer.getvalue())
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"image": cells, "label": pa.array(range(count), pa.int32())}).set_column(
            1, "label", pa.array([index % 3 for index in range(count)], pa.int32())
        ),
        path,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "manifest.toml").write_text(MANIFEST)
    write_parquet(folder / "data/tiny/train.parquet", 48, 0)
    write_parquet(folder / "data/tiny/test.parquet", 30, 1)
    return folder


@pytest.fixture(scope="module")
def made(world: Path) -> Path:
    make(world / "manifest.toml", world / "data", world / "out")
    return world / "out"


def test_writes_models_images_and_truth(made: Path) -> None:
    names = sorted(path.name for path in made.iterdir())
    assert names == ["bad.safetensors", "clean.safetensors", "defence.npz", "test.npz", "truth.json"]
    truth = read_truth(made)
    assert truth["clean"].target_label is None
    assert truth["clean"].attack_success_rate is None
    assert truth["bad"].target_label == 1
    assert 0 <= (truth["bad"].attack_success_rate or 0) <= 1
    model = load(made / "bad.safetensors")
    assert (model.arch, model.num_classes) == ("resnet18_cifar", 3)
    assert load_clean(made / "defence.npz").class_counts == {0: 2, 1: 2, 2: 2}
    assert load_clean(made / "test.npz").class_counts == {0: 3, 1: 3, 2: 3}


def test_same_manifest_same_bytes(world: Path, made: Path, tmp_path: Path) -> None:
    make(world / "manifest.toml", world / "data", tmp_path, only=["bad"])
    assert (tmp_path / "bad.safetensors").read_bytes() == (made / "bad.safetensors").read_bytes()
    assert not (tmp_path / "clean.safetensors").exists()


def test_a_model_that_is_there_is_left_alone(world: Path, made: Path) -> None:
    before = (made / "bad.safetensors").stat().st_mtime_ns
    steps: list[str] = []
    truths = make(world / "manifest.toml", world / "data", made, progress=lambda name, *_: steps.append(name))
    assert (made / "bad.safetensors").stat().st_mtime_ns == before
    assert not steps
    assert [truth.name for truth in truths] == ["clean", "bad"]


def test_training_leaves_global_randomness_alone(world: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    make(world / "manifest.toml", world / "data", tmp_path, only=["clean"])
    assert torch.equal(torch.rand(3), expected)


def test_poisoned_images_are_bytes_and_counts_exact() -> None:
    raw = RawImages(torch.randint(1, 255, (40, 3, 8, 8), dtype=torch.uint8), torch.arange(40) % 4)
    images, labels = poisoned(raw, BadNets(target=1, rate=0.2), 4, seed=0)
    changed = (images != raw.images).flatten(1).any(1)
    assert images.dtype == torch.uint8
    assert changed.sum() == 8
    assert set(images[changed][:, :, 4:7, 4:7].unique().tolist()) == {0, 255}
    assert (labels != raw.labels).sum() == 8
    assert poisoned(raw, None, 4, 0) == (raw.images, raw.labels)


def test_missing_data_and_unknown_names_are_named(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        make(world / "manifest.toml", tmp_path, tmp_path / "out")
    with pytest.raises(OptionError, match="no model 'nope'"):
        make(world / "manifest.toml", world / "data", tmp_path / "out", only=["nope"])
