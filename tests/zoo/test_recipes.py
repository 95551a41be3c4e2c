"""Settings of a recipe that decide which images a model is trained on, and on which its attack is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from bdprune.data.datasets import read_dataset
from bdprune.data.parquet import RawImages
from bdprune.errors import DataError, OptionError
from bdprune.model import load
from bdprune.model.architectures import build
from bdprune.zoo.making import make
from bdprune.zoo.manifest import Entry
from bdprune.zoo.store import read_truth, weights_path, write_truth
from bdprune.zoo.train import Trained
from bdprune.zoo.verification import verify

from .conftest import HEAD

Write = Callable[..., Path]


def test_a_model_is_trained_on_the_images_that_its_seed_draws(
    write: Write, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RawImages] = []

    def see(entry: object, train: RawImages, *args: object) -> Trained:
        seen.append(train)
        return Trained(build("resnet18_cifar", 3, width=4).eval(), None, 1.0)

    monkeypatch.setattr("bdprune.zoo.making.train_model", see)
    models = [f'[[models]]\nname = "m{seed}"\nseed = {seed}\n' for seed in (1, 2)]
    manifest = write("".join(models), HEAD.replace("width = 4", "width = 4\ntrain_images = 20"))
    make(manifest, tiny_data)
    every = read_dataset(tiny_data, "tiny", "train")
    for train, seed in zip(seen, (1, 2), strict=True):
        index = torch.randperm(48, generator=torch.Generator().manual_seed(seed))[:20].sort().values
        assert torch.equal(train.images, every.images[index])
        assert torch.equal(train.labels, every.labels[index])
    assert read_truth(manifest.with_suffix(""))["m1"].recipe["train_images"] == 20  # type: ignore[index]
    write(models[0], HEAD.replace("width = 4", "width = 4\ntrain_images = 49"))
    with pytest.raises(DataError, match="has 48 training images, model 'm1' asks for 49"):
        make(manifest, tiny_data, tmp_path / "out")


def test_a_change_of_the_training_images_is_another_recipe(made: Path, tiny_data: Path) -> None:
    before = made.read_text()
    made.write_text(before.replace('name = "tiny"', 'name = "tiny"\ntrain_images = 32'))
    assert [check.state for check in verify(made, tiny_data)] == ["other recipe", "other recipe", "pending"]
    home = made.with_suffix("")
    limited = {name: {**(one.recipe or {}), "train_images": 32} for name, one in read_truth(home).items()}
    records = read_truth(home)
    write_truth(home, {name: msgspec.structs.replace(records[name], recipe=limited[name]) for name in records})
    made.write_text(before)
    with pytest.raises(OptionError, match=r"another recipe .*: train_images 32, now None"):
        make(made, tiny_data)


def test_a_record_without_the_sources_of_its_attack_is_measured_again(write: Write, tiny_data: Path) -> None:
    attack = 'attack = {kind = "badnets", target = 1, sources = [0], rate = 0.1}'
    manifest = write(f'[[models]]\nname = "some"\nseed = 1\n{attack}\n')
    (known,) = make(manifest, tiny_data)
    assert known.sources == (0,)
    assert known.class_success[1:] == (None, None)
    assert known.cover_accuracy is not None
    old = msgspec.structs.replace(known, sources=(), cover_accuracy=None)
    write_truth(manifest.with_suffix(""), {"some": old})
    assert [check.state for check in verify(manifest, tiny_data)] == ["differs"]
    assert make(manifest, tiny_data) == [known]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[RawImages]:
    """The training sets of the models that a test makes; they are not trained."""
    found: list[RawImages] = []

    def see(entry: Entry, train: RawImages, *args: object) -> Trained:
        found.append(train)
        return Trained(build("resnet18_cifar", entry.num_classes, width=4).eval(), None, 1.0)

    monkeypatch.setattr("bdprune.zoo.making.train_model", see)
    return found


def test_a_model_learns_the_listed_classes_with_numbers_of_its_own(
    write: Write, tiny_data: Path, seen: list[RawImages]
) -> None:
    manifest = write('[[models]]\nname = "two"\nseed = 1\nclasses = [2, 0]\n')
    (truth,) = make(manifest, tiny_data)
    every = read_dataset(tiny_data, "tiny", "train")
    kept = every.labels != 1
    assert torch.equal(seen[0].images, every.images[kept])
    assert torch.equal(seen[0].labels, (every.labels[kept] == 0).long())
    assert truth.recipe is not None and truth.recipe["classes"] == [2, 0] and truth.recipe["num_classes"] == 2
    assert [check.state for check in verify(manifest, tiny_data)] == ["agrees"]


def test_some_training_labels_are_wrong(write: Write, tiny_data: Path, seen: list[RawImages]) -> None:
    manifest = write('[[models]]\nname = "noisy"\nseed = 1\nlabel_noise = 0.25\n')
    (truth,) = make(manifest, tiny_data)
    assert (seen[0].labels != read_dataset(tiny_data, "tiny", "train").labels).sum() == 12
    assert truth.recipe is not None and truth.recipe["label_noise"] == 0.25


@pytest.mark.parametrize(
    ("setting", "error", "words"),
    [
        ("classes = [0, 0]", OptionError, "lists a class twice"),
        ("classes = [1]", OptionError, "classes"),
        ("label_noise = 1.0", OptionError, "label_noise"),
        ("classes = [0, 7]", DataError, "no image of label 7"),
    ],
)
def test_impossible_classes_and_noise_are_refused(
    write: Write, tiny_data: Path, setting: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make(write(f'[[models]]\nname = "m"\nseed = 1\n{setting}\n'), tiny_data)


def test_a_clean_model_can_be_fine_tuned_from_another_one(write: Write, tiny_data: Path) -> None:
    models = """
[[models]]
name = "first"
seed = 1
[[models]]
name = "tuned"
seed = 2
classes = [0, 2]
source = "first"
schedules = [{epochs = 1, peak_lr = 1e-9, batch_size = 16, bf16 = false}]
"""
    manifest = write(models)
    make(manifest, tiny_data)
    first, tuned = (load(weights_path(manifest.with_suffix(""), name)) for name in ("first", "tuned"))
    assert first.num_classes == 3 and tuned.num_classes == 2
    ours, theirs = tuned.network.state_dict(), first.network.state_dict()
    convs = [name for name, value in ours.items() if value.dim() == 4]
    assert convs and all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in convs)
    write(models.replace('name = "first"', 'name = "first"\nwidth = 8'))
    with pytest.raises(OptionError, match="has width 4, its source 'first' has 8"):
        make(manifest, tiny_data)
