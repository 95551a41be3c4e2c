"""Making the models of a manifest on real images, and measuring them."""

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

_BATCH_ON_CPU, _BATCH = 125, 500  # on a CPU the maps of fewer images stay in its caches
Progress = Callable[[str, int, int, float], None]
"""Called with (model name, steps done, steps in all, loss)."""


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
    """What making the models of a zoo needs; arguments as in :func:`make`."""

    storage: store.Storage
    sets: Callable[[str, Part], RawImages]
    device: torch.device
    progress: Progress
    say: Callable[[str], None]

    def in_order(self, wanted: Sequence[Entry]) -> list[Entry]:
        """What is to be done, each behind what it starts from."""
        zoo, todo = self.storage.zoo, list[Entry]()

        def add(entry: Entry) -> None:
            if entry in todo or self.is_measured(entry):
                return
            if entry.source is not None and not self.storage.made(entry) and not self.source_is_made(entry):
                source = zoo.entry(entry.source)
                if source not in wanted:
                    first = f"making {source.name} first"
                    self.say(f"{entry.name} starts from {source.name}, which is not made yet: {first}.")
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
                f"{path} was made by another recipe than the manifest has for {entry.name!r}: {changes}.",
                "Delete it to make it again, or give the new model another name.",
            )

    def is_measured(self, entry: Entry) -> bool:
        """Whether there is nothing left to do."""
        truth = self.storage.truth(entry)
        return truth is not None and truth.complete

    def source_is_made(self, entry: Entry) -> bool:
        """Whether what the model starts from is there, if it starts from anything."""
        return entry.source is None or self.storage.source(self.storage.zoo.entry(entry.source)) is not None

    def make(self, entry: Entry) -> None:
        """Trains one model unless it is there already, measures it, and writes what is known of it."""
        work = store.work_path(self.storage.made(entry) or self.storage.place(entry), entry.name)
        make_folder(work)
        with store.locked(work, wait=False) as held, _threads(entry.threads):
            if not held:
                self.say(f"{entry.name} is being made by another process, and left to it.")
                return
            fresh = not self.storage.made(entry)
            if fresh:
                self._train(entry, work)
            if fresh or not self.is_measured(entry):
                self._measure(entry, work)
            shutil.rmtree(work, ignore_errors=True)  # it may be gone, by a process that ended while this one came
            with contextlib.suppress(OSError):  # another model is in the making
                work.parent.rmdir()

    def _train(self, entry: Entry, work: Path) -> None:
        train = self.sets(entry.dataset, "train")
        _check_fit(entry, train, self.sets(entry.dataset, "test"))
        source = self._load_source(entry, entry.source) if entry.source else None
        progress = functools.partial(self.progress, entry.name)
        trained = train_model(entry, train, work, source, self.device, progress, self.say)
        folder = self.storage.place(entry)
        env = store.Env(str(torch.__version__), entry.threads, device_name(self.device))
        store.write_cost(work, store.Cost(trained.seconds, env, entry.recipe))
        if trained.trigger is not None:
            store.save_trigger(trained.trigger, store.trigger_path(folder, entry.name))
        # The weights come last: where they are, the model is made.
        store.save_weights(trained.network, store.weights_path(folder, entry.name))

    def _load_source(self, entry: Entry, name: str) -> nn.Module:
        """The network that the attack starts from; waits for the process that is making it."""
        source = self.storage.zoo.entry(name)
        work = store.work_path(self.storage.place(source), name)
        if self.storage.source(source) is None and work.is_dir():
            self.say(f"{entry.name} waits for {name}, which another process is making.")
            with store.locked(work):
                pass
        folder = self.storage.source(source)
        if folder is None:
            raise OptionError(f"{entry.name} starts from {name}, which is not made.", f"Make {name} first.")
        return store.load_network(source, folder)

    def _measure(self, entry: Entry, work: Path) -> None:
        """Measures what was written: half precision is what users get."""
        folder, known = self.storage.made(entry), self.storage.truth(entry)
        assert folder is not None
        cost = store.read_cost(work) or (known.cost if known else store.Cost())
        truth = truth_of(entry, folder, self.sets(entry.dataset, "test"), cost, self.device)
        store.add_truth(folder, truth, [one.name for one in self.storage.zoo.models])

    def save_samples(self, folder: Path) -> None:
        """Keeps a few clean images with the models, for scans and repairs."""
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
    """Measures the model that lies in ``folder`` on the full test set, on the CPU by default."""
    _check_labels(entry, test)
    attack = entry.make_attack()
    trigger = store.load_trigger(entry, attack, folder, shape_of(test.images)) if attack else None
    network = store.load_network(entry, folder).to(device or torch.device("cpu"))
    found = measure(network, test, entry.num_classes, attack, trigger)
    target, made = attack.target if attack else None, msgspec.structs.asdict(cost)
    return store.Truth(name=entry.name, target_label=target, **vars(found), **made)


@dataclass(frozen=True)
class Measured:
    """Accuracies in [0, 1]; those of attacks are None for a clean model.

    Attributes:
        clean_accuracy: share of all test images, those of the target label included, predicted as their label.
        attack_success_rate: share of triggered images predicted as the attacker wants; images that have that label
            anyway are left out.
        robust_accuracy: share of the same images predicted as their true label.
        class_success: attack success rate by true label, None for labels that are left out; empty for a clean model.
    """

    clean_accuracy: float
    attack_success_rate: float | None = None
    robust_accuracy: float | None = None
    class_success: tuple[float | None, ...] = ()


def measure(
    network: nn.Module,
    test: RawImages,
    num_classes: int,
    attack: Attack | None = None,
    trigger: nn.Module | None = None,
) -> Measured:
    """Measures a model with its own trigger at full strength, in float32 with Winograd's convolutions where they pay.

    Args:
        network: images in [0, 1] -> logits, in eval mode.
        test: all test images.
        num_classes: K.
        attack: the model's attack, None for a clean model.
        trigger: images in [0, 1] -> triggered images, on the CPU; the same for every image batch. A copy of it runs
            where the network is: a generator is work for a GPU, too.
    """
    labels = test.labels
    accuracy = _share(_predict(network, test.images, None) == labels)
    if attack is None or trigger is None:
        return Measured(accuracy)
    goal = attack.goal(labels, num_classes)
    counts = goal != labels
    labels, goal = labels[counts], goal[counts]
    trigger = copy.deepcopy(trigger).to(next(network.parameters()).device)
    predicted = _predict(network, test.images[counts], trigger)
    hit = predicted == goal
    by_class = tuple(_share(hit[labels == label]) if (labels == label).any() else None for label in range(num_classes))
    return Measured(accuracy, _share(hit), _share(predicted == labels), by_class)


@torch.no_grad()
def _predict(network: nn.Module, images: Tensor, trigger: nn.Module | None) -> Tensor:
    """Labels ``[N]`` of images uint8 ``[N, C, H, W]``, triggered where there is a trigger."""
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


def balanced(labels: Tensor, per_class: int) -> Tensor:
    """Indices of ``per_class`` images of each class, seed 0, in file order."""
    generator = torch.Generator().manual_seed(0)
    return sample_per_class(labels, per_class, generator).sort().values
