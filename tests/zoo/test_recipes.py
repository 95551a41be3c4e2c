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
from bdprune.model.architectures import build
from bdprune.zoo.making import make
from bdprune.zoo.store import read_truth, write_truth
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
