"""Making the models of a manifest on real images, and measuring them."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bdprune.attacks import shape_of
from bdprune.data import CleanData, Part, RawImages, read_dataset
from bdprune.errors import DataError, OptionError
from bdprune.files import make_folder
from bdprune.ops import device_name
from bdprune.zoo.manifest import Entry, Manifest, read_manifest
from bdprune.zoo.measuring import measure
from bdprune.zoo.store import (
    Cost,
    Env,
    Shelf,
    Truth,
    add_truth,
    load_network,
    load_trigger,
    locked,
    other_recipe,
    read_cost,
    save_images,
    save_trigger,
    save_weights,
    trigger_path,
    weights_path,
    work_path,
    write_cost,
)
from bdprune.zoo.train import train_model

Progress = Callable[[str, int, int, float], None]
"""Called with (model name, steps done, steps in all, loss)."""


def _silent(name: str, step: int, steps: int, loss: float) -> None:
    """No progress."""


def _quiet(text: str) -> None:
    """Nobody is told."""


def make(
    manifest: Path,
    data: Path,
    out: Path | None = None,
    only: Sequence[str] = (),
    progress: Progress = _silent,
    say: Callable[[str], None] = _quiet,
    device: torch.device | None = None,
) -> list[Truth]:
    """Trains the models of a manifest, measures them on the full test set, and writes everything to their folder.

    Models that are made already are left alone, and measured where their truth is missing. A run that was killed is
    taken up where it was. Several processes may make the same zoo: each model is made by one of them.

    Args:
        manifest: TOML file.
        data: folder that holds the data sets, see ``read_dataset``.
        out: folder for ``<name>.safetensors``, ``<name>.trigger``, ``defence.npz``, ``test.npz`` and
            ``truth.json``; the manifest's own by default.
        only: names of the models to make, with what they start from; by default all that are not pending.
        progress: told after every step of training.
        say: told what else happens, a sentence each.
        device: where to train and measure; the CPU by default.

    Returns:
        The truth of the models that were asked for, in that order; one that another process is making is left out.

    Raises:
        OptionError: the manifest is not valid or has no model of a name in ``only``.
        DataError: the images cannot be read.
        OutputError: the folder cannot be written.
    """
    zoo = read_manifest(manifest)
    shelf = Shelf(zoo, out)
    sets = functools.lru_cache(maxsize=2)(functools.partial(read_dataset, data))
    due = [entry for entry in zoo.models if not entry.pending or shelf.made(entry)]
    wanted = [zoo.entry(name) for name in only] if only else due
    _save_samples(zoo, out or zoo.home, sets)
    todo = _in_order(zoo, shelf, wanted, say)
    while todo:
        ready = [entry for entry in todo if _source_is_made(shelf, entry)]
        entry = (ready or todo)[0]
        todo.remove(entry)
        _make_one(shelf, entry, sets, functools.partial(progress, entry.name), say, device)
    found = [shelf.truth(entry) for entry in wanted]
    return [truth for truth in found if truth is not None]


Sets = Callable[[str, Part], RawImages]


def _in_order(zoo: Manifest, shelf: Shelf, wanted: Sequence[Entry], say: Callable[[str], None]) -> list[Entry]:
    """What is to be done, each behind what it starts from."""
    todo: list[Entry] = []

    def add(entry: Entry) -> None:
        if entry in todo:
            return
        if _is_measured(shelf, entry):
            return
        if entry.source is not None and not shelf.made(entry):
            source = zoo.entry(entry.source)
            if shelf.source(source) is None:
                if source not in wanted:
                    say(f"{entry.name} starts from {source.name}, which is not made yet: making {source.name} first.")
                add(source)
        todo.append(entry)

    for entry in wanted:
        add(entry)
    for entry in [*wanted, *(zoo.entry(entry.source) for entry in todo if entry.source)]:
        _check_recipe(shelf, entry)
    return todo


def _check_recipe(shelf: Shelf, entry: Entry) -> None:
    changes = other_recipe(entry, shelf.truth(entry))
    if changes:
        path = weights_path(shelf.made(entry) or shelf.place(entry), entry.name)
        raise OptionError(
            f"{path} was made by another recipe than the manifest has for {entry.name!r}: {changes}.",
            "Delete it to make it again, or give the new model another name.",
        )


def _is_measured(shelf: Shelf, entry: Entry) -> bool:
    truth = shelf.truth(entry)
    return truth is not None and truth.complete


def _source_is_made(shelf: Shelf, entry: Entry) -> bool:
    return entry.source is None or shelf.source(shelf.zoo.entry(entry.source)) is not None


def _make_one(
    shelf: Shelf,
    entry: Entry,
    sets: Sets,
    progress: Callable[[int, int, float], None],
    say: Callable[[str], None],
    device: torch.device | None,
) -> None:
    """Trains one model unless it lies there already, measures it, and writes what is known of it."""
    work = work_path(shelf.made(entry) or shelf.place(entry), entry.name)
    make_folder(work)
    with locked(work, wait=False) as held, _threads(entry.threads):
        if not held:
            say(f"{entry.name} is being made by another process, and left to it.")
            return
        if not shelf.made(entry):
            _train(shelf, entry, sets, work, progress, say, device)
            _measure(shelf, entry, sets, work, device)
        elif not _is_measured(shelf, entry):
            _measure(shelf, entry, sets, work, device)
        shutil.rmtree(work, ignore_errors=True)  # it may be gone, by a process that ended while this one came
        with contextlib.suppress(OSError):  # another model is in the making
            work.parent.rmdir()


def _train(
    shelf: Shelf,
    entry: Entry,
    sets: Sets,
    work: Path,
    progress: Callable[[int, int, float], None],
    say: Callable[[str], None],
    device: torch.device | None,
) -> None:
    train = sets(entry.dataset, "train")
    _check_fit(entry, train, sets(entry.dataset, "test"))
    source = _load_source(shelf, entry, say) if entry.source else None
    trained = train_model(entry, train, work, source, device, progress, say)
    folder = shelf.place(entry)
    where = device_name(device or torch.device("cpu"))
    write_cost(work, Cost(trained.seconds, Env(str(torch.__version__), entry.threads, where), entry.recipe))
    if trained.trigger is not None:
        save_trigger(trained.trigger, trigger_path(folder, entry.name))
    # The weights come last: where they are, the model is made.
    save_weights(trained.network, weights_path(folder, entry.name))


def _load_source(shelf: Shelf, entry: Entry, say: Callable[[str], None]) -> nn.Module:
    """The network that the attack starts from; waits for the process that is making it."""
    assert entry.source is not None
    source = shelf.zoo.entry(entry.source)
    work = work_path(shelf.place(source), source.name)
    if shelf.source(source) is None and work.is_dir():
        say(f"{entry.name} waits for {source.name}, which another process is making.")
        with locked(work):
            pass
    folder = shelf.source(source)
    if folder is None:
        raise OptionError(f"{entry.name} starts from {source.name}, which is not made.", f"Make {source.name} first.")
    return load_network(source, folder)


def _measure(shelf: Shelf, entry: Entry, sets: Sets, work: Path, device: torch.device | None) -> None:
    """Measures what was written: half precision is what users get."""
    folder, known = shelf.made(entry), shelf.truth(entry)
    assert folder is not None
    cost = read_cost(work) or (known.cost if known else Cost())
    truth = truth_of(entry, folder, sets(entry.dataset, "test"), cost, device)
    add_truth(folder, truth, [one.name for one in shelf.zoo.models])


def truth_of(entry: Entry, folder: Path, test: RawImages, cost: Cost, device: torch.device | None = None) -> Truth:
    """Measures the model that lies in ``folder`` on the full test set, on the CPU by default."""
    _check_labels(entry, test)
    attack = entry.make_attack()
    trigger = load_trigger(entry, attack, folder, shape_of(test.images)) if attack else None
    network = load_network(entry, folder).to(device or torch.device("cpu"))
    found = measure(network, test, entry.num_classes, attack, trigger)
    return Truth(
        name=entry.name,
        target_label=attack.target if attack else None,
        clean_accuracy=found.clean_accuracy,
        attack_success_rate=found.attack_success_rate,
        robust_accuracy=found.robust_accuracy,
        seconds=cost.seconds,
        class_success=found.class_success,
        env=cost.env,
        recipe=cost.recipe,
    )


def _check_fit(entry: Entry, train: RawImages, test: RawImages) -> None:
    """Known before hours of training: that the model can be measured."""
    _check_labels(entry, train)
    _check_labels(entry, test)
    if shape_of(train.images) != shape_of(test.images):
        raise DataError(
            f"The training images of {entry.dataset} have shape {shape_of(train.images)}, its test images "
            f"{shape_of(test.images)}.",
            "Bring all images to one size and one number of channels.",
        )


def _check_labels(entry: Entry, raw: RawImages) -> None:
    highest = int(raw.labels.max())
    if highest >= entry.num_classes:
        raise DataError(
            f"{entry.dataset} has label {highest}, model {entry.name!r} has classes 0 to {entry.num_classes - 1}.",
            "Correct num_classes in the manifest.",
        )


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _save_samples(zoo: Manifest, folder: Path, sets: Sets) -> None:
    """Keeps a few clean images beside the models, for scans and repairs."""
    parts: tuple[tuple[Part, int, str], ...] = (
        ("train", zoo.defence_images, "defence"),
        ("test", zoo.test_images, "test"),
    )
    for part, count, name in parts:
        if not count or (folder / f"{name}.npz").exists():
            continue
        make_folder(folder)
        with locked(folder):
            raw = sets(zoo.dataset, part)
            index = balanced(raw.labels, max(count // len(torch.unique(raw.labels)), 1))
            save_images(CleanData(raw.images[index].float() / 255, raw.labels[index]), folder / f"{name}.npz")


def balanced(labels: Tensor, per_class: int) -> Tensor:
    """Indices of ``per_class`` images of each class, seed 0, in file order."""
    generator = torch.Generator().manual_seed(0)
    picks = []
    for label in labels.unique().tolist():
        index = (labels == label).nonzero().flatten()
        picks.append(index[torch.randperm(len(index), generator=generator)[:per_class]])
    return torch.cat(picks).sort().values
