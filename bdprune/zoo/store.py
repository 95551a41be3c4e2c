"""Writes and finds the weights, triggers, images and records of a zoo.

The checkpoints of a zoo differ in nothing but their weights.
"""

from __future__ import annotations

import fcntl
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import save as to_bytes
from torch import nn

from bdprune.attacks import Attack, Shape
from bdprune.data import CleanData
from bdprune.errors import ArtifactError, DataError, first_line
from bdprune.files import looks_like_safetensors, read_safetensors, write_atomically
from bdprune.model import load
from bdprune.zoo.manifest import Entry, Manifest


class Env(msgspec.Struct, frozen=True, omit_defaults=True):
    """The environment of a training: the version of torch, the number of threads, and the GPU's name or ``cpu``."""

    torch: str
    threads: int
    device: str = "cpu"


class Cost(msgspec.Struct, frozen=True):
    """Seconds of a training, its environment and its recipe; None if unknown."""

    seconds: float | None = None
    env: Env | None = None
    recipe: dict[str, Any] | None = None


class Truth(msgspec.Struct, frozen=True):
    """The record of one model; accuracies in [0, 1] on the full test set.

    Attributes:
        name: as in the manifest.
        target_label: target label of the trigger, None for a clean model and for all-to-all.
        clean_accuracy: on all classes.
        attack_success_rate: on triggered images whose label is not the attacker's, None for a clean model.
        robust_accuracy: share of these images that keep their true label, None for a clean model.
        seconds: training time, including the resumed parts of killed runs; None if unknown.
        class_success: attack success rate by true label, None for labels without such images; empty for a clean model.
        sources: labels of the images that the trigger works on; empty for all, and for a clean model.
        cover_accuracy: share of triggered images of other labels, except the target, predicted as their label; None
            without sources.
        env: environment of the training, None if unknown.
        recipe: settings of the model (``Entry.recipe``), None if unknown.
    """

    name: str
    target_label: int | None
    clean_accuracy: float
    attack_success_rate: float | None
    robust_accuracy: float | None
    seconds: float | None
    class_success: tuple[float | None, ...] = ()
    sources: tuple[int, ...] = ()
    cover_accuracy: float | None = None
    env: Env | None = None
    recipe: dict[str, Any] | None = None

    @property
    def cost(self) -> Cost:
        """The cost of the training."""
        return Cost(self.seconds, self.env, self.recipe)

    @property
    def complete(self) -> bool:
        """Whether it has every figure that this version measures."""
        return self.attack_success_rate is None or bool(self.class_success)


@dataclass(frozen=True)
class Storage:
    """Finds the files of a zoo's models.

    Args:
        zoo: the manifest.
        folder: a folder for the files instead of their default folders. If a model of an included manifest is missing
            there, its default folder is used.
    """

    zoo: Manifest
    folder: Path | None = None

    def place(self, entry: Entry) -> Path:
        """Folder that the model is written to."""
        return self.folder or entry.home

    def made(self, entry: Entry) -> Path | None:
        """Folder of the model, None if the model does not exist."""
        places = [self.place(entry)] if entry.home == self.zoo.home else [self.place(entry), entry.home]
        return next((place for place in places if weights_path(place, entry.name).exists()), None)

    def source(self, entry: Entry) -> Path | None:
        """Folder of a model that is another one's source: the same folder, or else its default folder."""
        return self.made(entry) or (entry.home if weights_path(entry.home, entry.name).exists() else None)

    def state(self, entry: Entry) -> str:
        """``made``, ``other recipe`` (the manifest has changed since the training), ``begun`` (a training that can be
        resumed), ``not kept`` (measured, but its weights are gone), ``pending`` or ``not made``.
        """
        if self.made(entry):
            return "other recipe" if other_recipe(entry, self.truth(entry)) else "made"
        if work_path(self.place(entry), entry.name).is_dir():
            return "begun"
        if self.record(entry):
            return "not kept"
        return "pending" if entry.pending else "not made"

    def truth(self, entry: Entry) -> Truth | None:
        """The record of the existing model, or None."""
        folder = self.made(entry)
        return None if folder is None else read_truth(folder).get(entry.name)

    def record(self, entry: Entry) -> Truth | None:
        """The last record of the model, even if its weights are gone; or None."""
        if self.made(entry):
            return self.truth(entry)
        found = (read_truth(folder).get(entry.name) for folder in dict.fromkeys([self.place(entry), entry.home]))
        return next((truth for truth in found if truth and not other_recipe(entry, truth)), None)


def other_recipe(entry: Entry, truth: Truth | None) -> str:
    """How the model's recipe differs from the manifest, in words; empty if it does not."""
    if truth is None or truth.recipe is None:
        return ""
    was, now = truth.recipe, entry.recipe
    names = dict.fromkeys([*now, *was])
    return ", ".join(f"{name} {was.get(name)}, now {now.get(name)}" for name in names if was.get(name) != now.get(name))


def weights_path(folder: Path, name: str) -> Path:
    """File of a model's weights."""
    return folder / f"{name}.safetensors"


def trigger_path(folder: Path, name: str) -> Path:
    """File of a model's trigger: safetensors, with a suffix that scans of the folder do not load as a model. A clean
    model has none.
    """
    return folder / f"{name}.trigger"


def work_path(folder: Path, name: str) -> Path:
    """Folder of the checkpoints that a killed training resumes from; it is removed when the model is complete."""
    return folder / ".making" / name


def save_weights(network: nn.Module, path: Path) -> None:
    """Writes the weights in half precision: no metadata, keys in the network's own order, batch counters at zero.

    The write is atomic.
    """
    state = {}
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros_like(tensor, device="cpu")  # the counter would reveal the length of the training
        else:
            state[name] = tensor.detach().cpu().half().contiguous()
    write_atomically(path, to_bytes(state))


def save_trigger(trigger: nn.Module, path: Path) -> None:
    """Writes the tensors of a trigger in their own precision. The write is atomic."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in trigger.state_dict().items()}
    write_atomically(path, to_bytes(state))


def load_network(entry: Entry, folder: Path) -> nn.Module:
    """The network of an existing model, float32, on the CPU, in eval mode: images in [0, 1] -> logits.

    Raises:
        ArtifactError: the file cannot be read.
        ArchitectureError: the file holds another architecture.
    """
    return load(weights_path(folder, entry.name), arch=entry.arch, num_classes=entry.num_classes).network


def load_trigger(entry: Entry, attack: Attack, folder: Path, shape: Shape) -> nn.Module:
    """The trigger of an existing model, on the CPU, in eval mode.

    Without a file, a static trigger is made from the attack's settings.

    Args:
        entry: the model.
        attack: its attack.
        folder: of the model.
        shape: (C, H, W) of the images.

    Raises:
        DataError: the file is missing, damaged, or holds another trigger.
    """
    trigger, path = attack.new_trigger(shape), trigger_path(folder, entry.name)
    if not path.exists() and attack.trigger_type == "static":
        return trigger.eval()
    try:
        return fill_trigger(trigger, path)
    except ArtifactError as error:
        hint = "Download it again, or make the model again."
        raise DataError(f"The trigger {path} of model {entry.name!r} cannot be read: {error.message}", hint) from None


def fill_trigger(trigger: nn.Module, path: Path) -> nn.Module:
    """The trigger with the learned tensors of a safetensors file, in eval mode.

    Raises:
        ArtifactError: the file cannot be read, or holds another trigger.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"Cannot read the trigger {path}: {error.strerror}.", "Name an existing file.") from None
    if not looks_like_safetensors(data):
        raise ArtifactError(f"{path} is not a safetensors file.", "Name the file of a trigger.")
    try:
        trigger.load_state_dict(read_safetensors(data)[0])
    except RuntimeError as error:
        hint = "Name a file of this attack, learned with the same settings and image size."
        raise ArtifactError(f"{path} does not fit the trigger: {first_line(error)}", hint) from None
    return trigger.eval()


def save_images(data: CleanData, path: Path) -> None:
    """Writes images and labels as a compressed ``.npz`` of uint8 ``[N, C, H, W]`` and int64 ``[N]``."""
    images = (data.images * 255).round().to(torch.uint8).numpy()
    archive = io.BytesIO()
    np.savez_compressed(archive, images=images, labels=data.labels.numpy())
    write_atomically(path, archive.getvalue())


def read_truth(folder: Path) -> dict[str, Truth]:
    """The records that ``zoo make`` wrote for the models in ``folder``, by name; empty if there are none.

    Raises:
        DataError: the file cannot be read.
    """
    path = folder / "truth.json"
    if not path.exists():
        return {}
    try:
        return {truth.name: truth for truth in msgspec.json.decode(path.read_bytes(), type=list[Truth])}
    except (OSError, msgspec.MsgspecError) as error:
        raise DataError(f"{path} cannot be read: {error}.", "Download it again.") from None


def write_truth(folder: Path, truths: Mapping[str, Truth]) -> None:
    """Writes ``truth.json`` atomically."""
    text = msgspec.json.format(msgspec.json.encode(list(truths.values())), indent=2)
    write_atomically(folder / "truth.json", text + b"\n")


def add_truth(folder: Path, truth: Truth, order: list[str]) -> None:
    """Adds one model's record to ``truth.json``; several processes may do so at once.

    Args:
        folder: of the zoo.
        truth: of one model.
        order: names in the order of the file.
    """
    with locked(folder):
        truths = {**read_truth(folder), truth.name: truth}
        names = [name for name in order if name in truths]
        write_truth(folder, {name: truths[name] for name in dict.fromkeys([*names, *truths])})


def write_cost(work: Path, cost: Cost) -> None:
    """Writes the cost of a training to the model's work folder, until the model is measured."""
    write_atomically(work / "cost.json", msgspec.json.encode(cost))


def read_cost(work: Path) -> Cost | None:
    """The cost that ``write_cost`` wrote, or None."""
    path = work / "cost.json"
    return msgspec.json.decode(path.read_bytes(), type=Cost) if path.exists() else None


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Locks a folder for this process; the lock ends with the process.

    Args:
        folder: to lock; if it is gone, another process has just finished with it.
        wait: whether to wait for another process that holds the lock.

    Yields:
        Whether this process holds the lock.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    held = False
    try:
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        yield held
    finally:
        os.close(handle)
