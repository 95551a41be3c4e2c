"""Training the models of a manifest on real images."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bdprune.attacks.base import Attack, Setting, shape_of
from bdprune.data.clean import CleanData
from bdprune.data.parquet import RawImages, read_parquet
from bdprune.model.architectures import build
from bdprune.training.evaluate import attack_success_rate, clean_accuracy, robust_accuracy
from bdprune.training.fit import fit
from bdprune.zoo.manifest import Entry, Manifest, read_manifest
from bdprune.zoo.store import Truth, read_truth, save_images, save_weights, write_truth

Progress = Callable[[str, int, int, float], None]
"""Called with (model name, steps done, steps in all, loss)."""


def _silent(name: str, step: int, steps: int, loss: float) -> None:
    """No progress."""


def make(manifest: Path, data: Path, out: Path, only: Sequence[str] = (), progress: Progress = _silent) -> list[Truth]:
    """Trains the models of a manifest, measures them on the full test set, and writes everything to ``out``.

    Models whose weights are in ``out`` already are left alone.

    Args:
        manifest: TOML file.
        data: folder with ``<dataset>/train.parquet`` and ``<dataset>/test.parquet``.
        out: folder for ``<name>.safetensors``, ``defence.npz``, ``test.npz`` and ``truth.json``.
        only: names of the models to make; all by default.

    Raises:
        OptionError: the manifest is not valid or has no model of a name in ``only``.
        DataError: the images cannot be read.
    """
    zoo = read_manifest(manifest)
    entries = [zoo.entry(name) for name in only] if only else zoo.models
    todo = [entry for entry in entries if not (out / f"{entry.name}.safetensors").exists()]
    out.mkdir(parents=True, exist_ok=True)
    truths = read_truth(out)
    train = read_parquet(data / zoo.dataset / "train.parquet")
    test = read_parquet(data / zoo.dataset / "test.parquet")
    _save_samples(zoo, train, test, out)
    torch.set_num_threads(zoo.threads)
    for entry in todo:
        start = time.perf_counter()
        network = train_model(zoo, entry, train, progress)
        save_weights(network, out / f"{entry.name}.safetensors")
        # Measured on what was written: half precision is what users get.
        network.load_state_dict({name: value.half().float() for name, value in network.state_dict().items()})
        truths[entry.name] = _measure(entry, network, zoo.num_classes, test, time.perf_counter() - start)
        write_truth(out, truths)
    return [truths[entry.name] for entry in entries if entry.name in truths]


def train_model(zoo: Manifest, entry: Entry, train: RawImages, progress: Progress = _silent) -> nn.Module:
    """One trained network in eval mode; the same seed, threads and machine give the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(entry.seed)
        network = build(zoo.arch, zoo.num_classes, in_channels=train.images.shape[1], width=zoo.width)
    steps = [schedule.steps(len(train.labels)) for schedule in zoo.schedules]
    images, labels = poisoned(train, entry.make_attack(), zoo.num_classes, entry.seed)
    for index, schedule in enumerate(zoo.schedules):
        told = functools.partial(_told, progress, entry.name, sum(steps[:index]), sum(steps))
        # Each cycle draws an order and an augmentation of its own.
        fit(network, images, labels, schedule, entry.seed + 1000 * index, told)
    return network


def _told(progress: Progress, name: str, before: int, steps: int, step: int, _: int, loss: float) -> None:
    progress(name, before + step, steps, loss)


def poisoned(train: RawImages, attack: Attack | None, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """The training set as the attacker hands it over: images uint8 ``[N, C, H, W]`` (saturated), labels ``[N]``."""
    if attack is None:
        return train.images, train.labels
    setting = Setting(train.images, train.labels, num_classes, seed)
    trigger = attack.new_trigger(shape_of(train.images))
    set_ = attack.poison(setting, trigger, torch.Generator().manual_seed(seed))
    return set_.images, set_.labels


def _measure(entry: Entry, network: nn.Module, num_classes: int, test: RawImages, seconds: float) -> Truth:
    images, labels = test.images.float() / 255, test.labels
    attack = entry.make_attack()
    accuracy = clean_accuracy(network, images, labels)
    if attack is None:
        return Truth(entry.name, None, accuracy, None, None, seconds)
    trigger, goal = attack.new_trigger(shape_of(images)), attack.goal(labels, num_classes)
    success = attack_success_rate(network, images, labels, trigger, goal)
    robust = robust_accuracy(network, images, labels, trigger, goal)
    return Truth(entry.name, attack.target, accuracy, success, robust, seconds)


def _save_samples(zoo: Manifest, train: RawImages, test: RawImages, out: Path) -> None:
    for raw, count, name in ((train, zoo.defence_images, "defence"), (test, zoo.test_images, "test")):
        path = out / f"{name}.npz"
        if not path.exists():
            index = _balanced(raw.labels, count // zoo.num_classes)
            save_images(CleanData(raw.images[index].float() / 255, raw.labels[index]), path)


def _balanced(labels: Tensor, per_class: int) -> Tensor:
    """Indices of ``per_class`` images of each class, seed 0, in file order."""
    generator = torch.Generator().manual_seed(0)
    picks = []
    for label in labels.unique().tolist():
        index = (labels == label).nonzero().flatten()
        picks.append(index[torch.randperm(len(index), generator=generator)[:per_class]])
    return torch.cat(picks).sort().values
