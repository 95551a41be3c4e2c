"""Trains the models of a manifest on real images, and measures them."""

from __future__ import annotations

import contextlib
import copy
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from bdprune.attacks import Attack, shape_of
from bdprune.data import CleanData, Part, RawImages, read_dataset, sample_per_class
from bdprune.errors import DataError, OptionError
from bdprune.files import make_folder
from bdprune.ops import device_name
from bdprune.runtime import DEFAULT, convs_of, predict
from bdprune.zoo import store
from bdprune.zoo.manifest import Entry, read_manifest
from bdprune.zoo.train import train_model

_BATCH_ON_CPU, _BATCH = 125, 500  # the feature maps of 125 images fit into the caches of a CPU
Progress = Callable[[str, int, int, float], None]
"""Called with (model name, steps done, total steps, loss)."""


def make(
    manifest: Path,
    data: Path,
    out: Path | None = None,
    only: Sequence[str] = (),
    progress: Progress = lambda name, step, steps, loss: None,
    say: Callable[[str], None] = lambda text: None,
    device: torch.device | None = None,
) -> list[store.Truth]:
    """Trains the models of a manifest, measures them on the full test set, and writes everything to their folder.

    Existing models stay as they are; models without a record are measured. A killed run resumes from its last
    checkpoint. Several processes may train the same zoo: each takes different models.

    Args:
        manifest: TOML file.
        data: folder of the data sets, see ``read_dataset``.
        out: folder for ``<name>.safetensors``, ``<name>.trigger``, ``defence.npz``, ``test.npz`` and
            ``truth.json``; by default the manifest's folder.
        only: names of the models to train, along with their sources; by default all that are not pending.
        progress: called after every training step.
        say: called with a sentence about each other event.
        device: where to train and measure; the CPU by default.

    Returns:
        The records of the requested models, in that order, without models that another process is training.

    Raises:
        OptionError: the manifest is invalid, or a name in ``only`` is unknown.
        DataError: the images cannot be read.
        OutputError: the folder cannot be written.
    """
    zoo = read_manifest(manifest)
    storage = store.Storage(zoo, out)
    sets = functools.lru_cache(maxsize=2)(functools.partial(read_dataset, data))
    maker = _Maker(storage, sets, device or torch.device("cpu"), progress, say)
    due = [entry for entry in zoo.models if not entry.pending or storage.made(entry)]
    wanted = [zoo.entry(name) for name in only] if only else due
    maker.save_samples(out or zoo.home)
    todo = maker.in_order(wanted)
    while todo:
        ready = [entry for entry in todo if maker.source_is_made(entry)]
        entry = (ready or todo)[0]
        todo.remove(entry)
        maker.make(entry)
    found = [storage.truth(entry) for entry in wanted]
    return [truth for truth in found if truth is not None]


@dataclass(frozen=True)
class _Maker:
    """Trains and measures the models of a zoo; arguments as in :func:`make`."""

    storage: store.Storage
    sets: Callable[[str, Part], RawImages]
    device: torch.device
    progress: Progress
    say: Callable[[str], None]

    def in_order(self, wanted: Sequence[Entry]) -> list[Entry]:
        """The models to train, each after its source."""
        zoo, todo = self.storage.zoo, list[Entry]()

        def add(entry: Entry) -> None:
            if entry in todo or self.is_measured(entry):
                return
            if entry.source is not None and not self.storage.made(entry) and not self.source_is_made(entry):
                source = zoo.entry(entry.source)
                if source not in wanted:
                    self.say(f"{entry.name} starts from {source.name}, which does not exist yet and is trained first.")
                add(source)
            todo.append(entry)

        for entry in wanted:
            add(entry)
        for entry in [*wanted, *(zoo.entry(entry.source) for entry in todo if entry.source)]:
            self._check_recipe(entry)
        return todo

    def _check_recipe(self, entry: Entry) -> None:
        changes = store.other_recipe(entry, self.storage.truth(entry))
        if changes:
            path = store.weights_path(self.storage.made(entry) or self.storage.place(entry), entry.name)
            raise OptionError(
                f"{path} was made by another recipe than the manifest's for {entry.name!r}: {changes}.",
                "Delete it to train it again, or give the new model another name.",
            )

    def is_measured(self, entry: Entry) -> bool:
        """Whether the model exists and has a complete record."""
        truth, attack = self.storage.truth(entry), entry.make_attack()
        return truth is not None and truth.complete and truth.sources == (attack.sources if attack else ())

    def source_is_made(self, entry: Entry) -> bool:
        """Whether the model's source exists; True if it needs none."""
        return entry.source is None or self.storage.source(self.storage.zoo.entry(entry.source)) is not None

    def make(self, entry: Entry) -> None:
        """Trains one model if it does not exist, measures it, and writes its record."""
        work = store.work_path(self.storage.made(entry) or self.storage.place(entry), entry.name)
        make_folder(work)
        with store.locked(work, wait=False) as held, _threads(entry.threads):
            if not held:
                self.say(f"Skipped {entry.name}: another process is training it.")
                return
            fresh = not self.storage.made(entry)
            if fresh:
                self._train(entry, work)
            if fresh or not self.is_measured(entry):
                self._measure(entry, work)
            shutil.rmtree(work, ignore_errors=True)  # another process may have removed it
            with contextlib.suppress(OSError):  # another model is in training
                work.parent.rmdir()

    def _train(self, entry: Entry, work: Path) -> None:
        train, test = (images_of(entry, self.sets(entry.dataset, part)) for part in ("train", "test"))
        _check_fit(entry, train, test)
        train = _noisy(entry, _some(entry, train))
        source = self._load_source(entry, entry.source) if entry.source else None
        progress = functools.partial(self.progress, entry.name)
        trained = train_model(entry, train, work, source, self.device, progress, self.say)
        folder = self.storage.place(entry)
        env = store.Env(str(torch.__version__), entry.threads, device_name(self.device))
        store.write_cost(work, store.Cost(trained.seconds, env, entry.recipe))
        if trained.trigger is not None:
            store.save_trigger(trained.trigger, store.trigger_path(folder, entry.name))
        # The weights come last: if they exist, the model is complete.
        store.save_weights(trained.network, store.weights_path(folder, entry.name))

    def _load_source(self, entry: Entry, name: str) -> nn.Module:
        """The network that the attack starts from; waits if another process is training it."""
        source = self.storage.zoo.entry(name)
        work = store.work_path(self.storage.place(source), name)
        if self.storage.source(source) is None and work.is_dir():
            self.say(f"{entry.name} waits for {name}, which another process is training.")
            with store.locked(work):
                pass
        folder = self.storage.source(source)
        if folder is None:
            raise OptionError(f"{entry.name} starts from {name}, which does not exist.", f"Make {name} first.")
        return store.load_network(source, folder)

    def _measure(self, entry: Entry, work: Path) -> None:
        """Measures the written file: its weights have half precision, as users get them."""
        folder, known = self.storage.made(entry), self.storage.truth(entry)
        assert folder is not None
        cost = store.read_cost(work) or (known.cost if known else store.Cost())
        test = images_of(entry, self.sets(entry.dataset, "test"))
        truth = truth_of(entry, folder, test, cost, self.device)
        store.add_truth(folder, truth, [one.name for one in self.storage.zoo.models])

    def save_samples(self, folder: Path) -> None:
        """Writes a few clean images next to the models, for scans and repairs."""
        zoo = self.storage.zoo
        parts: tuple[tuple[str, Part, int], ...] = (
            ("defence.npz", "train", zoo.defence_images),
            ("test.npz", "test", zoo.test_images),
        )
        for name, part, count in parts:
            path = folder / name
            if not count or path.exists():
                continue
            make_folder(folder)
            with store.locked(folder):
                raw = self.sets(zoo.dataset, part)
                index = balanced(raw.labels, max(count // len(torch.unique(raw.labels)), 1))
                store.save_images(CleanData(raw.images[index].float() / 255, raw.labels[index]), path)


def truth_of(
    entry: Entry, folder: Path, test: RawImages, cost: store.Cost, device: torch.device | None = None
) -> store.Truth:
    """Measures the model in ``folder`` on the full test set, on the CPU by default."""
    _check_labels(entry, test)
    attack = entry.make_attack()
    trigger = store.load_trigger(entry, attack, folder, shape_of(test.images)) if attack else None
    network = store.load_network(entry, folder).to(device or torch.device("cpu"))
    found = measure(network, test, entry.num_classes, attack, trigger)
    target, sources = (attack.target, attack.sources) if attack else (None, ())
    made = msgspec.structs.asdict(cost)
    return store.Truth(name=entry.name, target_label=target, sources=sources, **vars(found), **made)


@dataclass(frozen=True)
class Measured:
    """Accuracies in [0, 1]; the attack's are None for a clean model.

    Attributes:
        clean_accuracy: share of all test images, including the target label's, predicted as their label.
        attack_success_rate: share of triggered images predicted as the attacker wants, without images that have that
            label anyway.
        robust_accuracy: share of the same images predicted as their true label.
        class_success: attack success rate by true label, None for excluded labels; empty for a clean model.
        cover_accuracy: share of triggered images with a label that is neither a source nor the target, predicted as
            their label; None if the trigger works on all images.
    """

    clean_accuracy: float
    attack_success_rate: float | None = None
    robust_accuracy: float | None = None
    class_success: tuple[float | None, ...] = ()
    cover_accuracy: float | None = None


def measure(
    network: nn.Module,
    test: RawImages,
    num_classes: int,
    attack: Attack | None = None,
    trigger: nn.Module | None = None,
) -> Measured:
    """Measures a model with its own trigger at full strength, in float32, with Winograd's convolutions if faster.

    Args:
        network: images in [0, 1] -> logits, in eval mode.
        test: all test images.
        num_classes: K.
        attack: the model's attack, None for a clean model.
        trigger: images in [0, 1] -> triggered images, on the CPU; the same for every batch. A copy of it runs on the
            network's device, because generators are slow on a CPU.
    """
    labels = test.labels
    accuracy = _share(_predict(network, test.images, None) == labels)
    if attack is None or trigger is None:
        return Measured(accuracy)
    goal = attack.goal(labels, num_classes)
    counts = goal != labels
    covers = ~counts & (labels != (-1 if attack.target is None else attack.target))
    truth, labels, goal = labels, labels[counts], goal[counts]
    trigger = copy.deepcopy(trigger).to(next(network.parameters()).device)
    predicted = _predict(network, test.images[counts], trigger)
    hit = predicted == goal
    by_class = tuple(_share(hit[labels == label]) if (labels == label).any() else None for label in range(num_classes))
    kept = _predict(network, test.images[covers], trigger) == truth[covers]
    kept_share = _share(kept) if len(kept) else None
    return Measured(accuracy, _share(hit), _share(predicted == labels), by_class, kept_share)


@torch.no_grad()
def _predict(network: nn.Module, images: Tensor, trigger: nn.Module | None) -> Tensor:
    """Labels ``[N]`` of images uint8 ``[N, C, H, W]``, triggered if there is a trigger."""
    parts = []
    device = next(network.parameters()).device
    for batch in images.split(_BATCH_ON_CPU if device.type == "cpu" else _BATCH):
        floats = batch.to(device).float() / 255
        shown = trigger(floats).clamp(0, 1) if trigger else floats
        with convs_of(DEFAULT):
            parts.append(predict(network, shown))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()


def images_of(entry: Entry, whole: RawImages) -> RawImages:
    """The images of a data set whose labels the model learns, with the model's numbers for these labels.

    Raises:
        DataError: the set has no image of one of the labels.
    """
    if not entry.classes:
        return whole
    number = torch.full((max(int(whole.labels.max()), *entry.classes) + 1,), -1)
    number[list(entry.classes)] = torch.arange(len(entry.classes))
    labels = number[whole.labels]
    missing = set(entry.classes) - set(whole.labels.tolist())
    if missing:
        raise DataError(
            f"{entry.dataset} has no image of label {min(missing)}, which model {entry.name!r} learns.",
            "Correct classes in the manifest.",
        )
    names = tuple(whole.class_names[label] for label in entry.classes) if whole.class_names else ()
    return RawImages(whole.images[labels >= 0], labels[labels >= 0], names)


def clean_images(entry: Entry, train: RawImages, count: int = 500, seed: int = 0) -> CleanData:
    """The images that a defender of the model has: about ``count`` training images, at least 10 of each label.

    Args:
        entry: the model.
        train: the training images of its data set; poisoned ones are clean here.
        count: number of images that the labels share equally.
        seed: of the draw.
    """
    own = images_of(entry, train)
    generator = torch.Generator().manual_seed(seed)
    index = sample_per_class(own.labels, max(count // entry.num_classes, 10), generator).sort().values
    return CleanData(own.images[index].float() / 255, own.labels[index], class_names=own.class_names)


def _noisy(entry: Entry, train: RawImages) -> RawImages:
    """The images with a random other label for a share of them."""
    if not entry.label_noise:
        return train
    generator = torch.Generator().manual_seed(entry.seed)
    labels = train.labels.clone()
    wrong = torch.randperm(len(labels), generator=generator)[: round(entry.label_noise * len(labels))]
    labels[wrong] = (labels[wrong] + torch.randint(1, entry.num_classes, wrong.shape, generator=generator)) % (
        entry.num_classes
    )
    return RawImages(train.images, labels, train.class_names)


def _some(entry: Entry, train: RawImages) -> RawImages:
    """The images that the model is trained on, in the order of the file."""
    count = len(train.labels)
    if entry.train_images is None:
        return train
    if entry.train_images > count:
        raise DataError(
            f"{entry.dataset} has {count:,} training images, model {entry.name!r} asks for {entry.train_images:,}.",
            "Lower train_images in the manifest.",
        )
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(entry.seed))[: entry.train_images]
    index = drawn.sort().values
    return RawImages(train.images[index], train.labels[index], train.class_names)


def _check_fit(entry: Entry, train: RawImages, test: RawImages) -> None:
    """Checks, before hours of training, that the model can be measured."""
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


def balanced(labels: Tensor, per_class: int) -> Tensor:
    """Indices of ``per_class`` images of each class, seed 0, in file order."""
    generator = torch.Generator().manual_seed(0)
    return sample_per_class(labels, per_class, generator).sort().values
