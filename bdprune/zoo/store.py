"""The one way a zoo writes and finds weights, triggers, images and the truth.

Nothing but the weights themselves tells a zoo's checkpoints apart.
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
    """What trained a model: the version of torch, the number of threads, and the GPU's name or ``cpu``."""

    torch: str
    threads: int
    device: str = "cpu"


class Cost(msgspec.Struct, frozen=True):
    """Seconds that a model took, what trained it, and by what recipe; None where that is not known."""

    seconds: float | None = None
    env: Env | None = None
    recipe: dict[str, Any] | None = None


class Truth(msgspec.Struct, frozen=True):
    """What is known of one model; accuracies in [0, 1] on the full test set.

    Attributes:
        name: as in the manifest.
        target_label: label that the trigger calls, None for a clean model and for all-to-all.
        clean_accuracy: on all classes.
        attack_success_rate: on triggered images that have another label than the attacker wants, None for a clean
            model.
        robust_accuracy: triggered images that still get their true label, None for a clean model.
        seconds: training time, that of killed runs included as far as they were taken up; None when it is not known.
        class_success: attack success rate by true label, None for labels without such images; empty for a clean model.
        env: what trained it, None when that is not known.
        recipe: what it was made by (``Entry.recipe``), None when that is not known.
    """

    name: str
    target_label: int | None
    clean_accuracy: float
    attack_success_rate: float | None
    robust_accuracy: float | None
    seconds: float | None
    class_success: tuple[float | None, ...] = ()
    env: Env | None = None
    recipe: dict[str, Any] | None = None

    @property
    def cost(self) -> Cost:
        """How it was made."""
        return Cost(self.seconds, self.env, self.recipe)

    @property
    def complete(self) -> bool:
        """Whether all was measured that is measured now."""
        return self.attack_success_rate is None or bool(self.class_success)


@dataclass(frozen=True)
class Storage:
    """Where the models of a zoo lie.

    Args:
        zoo: the manifest.
        folder: another place for its files than their homes. Models of included manifests are taken from their own
            home where they lie there.
    """

    zoo: Manifest
    folder: Path | None = None

    def place(self, entry: Entry) -> Path:
        """Folder that the model is made into."""
        return self.folder or entry.home

    def made(self, entry: Entry) -> Path | None:
        """Folder where the model lies, None when it is not made."""
        places = [self.place(entry)] if entry.home == self.zoo.home else [self.place(entry), entry.home]
        return next((place for place in places if weights_path(place, entry.name).exists()), None)

    def source(self, entry: Entry) -> Path | None:
        """Folder where a model lies that another one is made from: the same, or at last its home."""
        return self.made(entry) or (entry.home if weights_path(entry.home, entry.name).exists() else None)

    def state(self, entry: Entry) -> str:
        """``made``, ``other recipe`` (made before the manifest was changed), ``begun`` (a training that can be taken
        up), ``not kept`` (measured, but its weights are gone), ``pending`` or ``not made``.
        """
        if self.made(entry):
            return "other recipe" if other_recipe(entry, self.truth(entry)) else "made"
        if work_path(self.place(entry), entry.name).is_dir():
            return "begun"
        if self.record(entry):
            return "not kept"
        return "pending" if entry.pending else "not made"

    def truth(self, entry: Entry) -> Truth | None:
        """What was measured of the model that lies there, None when nothing was."""
        folder = self.made(entry)
        return None if folder is None else read_truth(folder).get(entry.name)

    def record(self, entry: Entry) -> Truth | None:
        """What was last measured of the model, whether or not its weights were kept; None when nothing was."""
        if self.made(entry):
            return self.truth(entry)
        found = (read_truth(folder).get(entry.name) for folder in dict.fromkeys([self.place(entry), entry.home]))
        return next((truth for truth in found if truth and not other_recipe(entry, truth)), None)


def other_recipe(entry: Entry, truth: Truth | None) -> str:
    """What the manifest has otherwise than the model was made, in words; empty where it has nothing so."""
    if truth is None or truth.recipe is None:
        return ""
    was, now = truth.recipe, entry.recipe
    return ", ".join(f"{name} {was.get(name)}, now {now[name]}" for name in now if was.get(name) != now[name])


def weights_path(folder: Path, name: str) -> Path:
    """File of a model's weights."""
    return folder / f"{name}.safetensors"


def trigger_path(folder: Path, name: str) -> Path:
    """File of a model's trigger, safetensors under a suffix that no scan of the folder takes for a model; a clean model
    has none.
    """
    return folder / f"{name}.trigger"


def work_path(folder: Path, name: str) -> Path:
    """Folder of what a training that was killed is taken up from; it is gone when the model is made."""
    return folder / ".making" / name


def save_weights(network: nn.Module, path: Path) -> None:
    """Writes the weights in half precision: no metadata, keys in the network's own order, batch counters at zero.

    The file appears whole or not at all.
    """
    state = {}
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros_like(tensor, device="cpu")  # it would tell how long a model was trained, and how
        else:
            state[name] = tensor.detach().cpu().half().contiguous()
    write_atomically(path, to_bytes(state))


def save_trigger(trigger: nn.Module, path: Path) -> None:
    """Writes what a trigger is made of, in the precision it has. The file appears whole or not at all."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in trigger.state_dict().items()}
    write_atomically(path, to_bytes(state))


def load_network(entry: Entry, folder: Path) -> nn.Module:
    """The network of a model that is made, float32, on the CPU, in eval mode: images in [0, 1] -> logits.

    Raises:
        ArtifactError: the file cannot be read.
        ArchitectureError: it is of another architecture.
    """
    return load(weights_path(folder, entry.name), arch=entry.arch, num_classes=entry.num_classes).network


def load_trigger(entry: Entry, attack: Attack, folder: Path, shape: Shape) -> nn.Module:
    """The trigger of a model that is made, on the CPU, in eval mode.

    A static one is made from the attack's settings where no file has it.

    Args:
        entry: the model.
        attack: its attack.
        folder: where it lies.
        shape: (C, H, W) of the images.

    Raises:
        DataError: the file is missing, damaged or of another trigger.
    """
    trigger, path = attack.new_trigger(shape), trigger_path(folder, entry.name)
    if not path.exists() and attack.trigger_type == "static":
        return trigger.eval()
    try:
        return fill_trigger(trigger, path)
    except ArtifactError as error:
        hint = "Fetch it again, or make the model again."
        raise DataError(f"The trigger {path} of model {entry.name!r} cannot be read: {error.message}", hint) from None


def fill_trigger(trigger: nn.Module, path: Path) -> nn.Module:
    """The trigger with what it has learned, which lies in a safetensors file, in eval mode.

    Raises:
        ArtifactError: the file cannot be read, or holds another trigger.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"Cannot read the trigger {path}: {error.strerror}.", "Name an existing file.") from None
    if not looks_like_safetensors(data):
        raise ArtifactError(f"{path} is no safetensors file.", "Name the file of a trigger.")
    try:
        trigger.load_state_dict(read_safetensors(data)[0])
    except RuntimeError as error:
        hint = "Name a file of this attack, with the settings and image size that it was learned with."
        raise ArtifactError(f"{path} does not fit the trigger: {first_line(error)}", hint) from None
    return trigger.eval()


def save_images(data: CleanData, path: Path) -> None:
    """Writes images and labels as a compressed ``.npz`` of uint8 ``[N, C, H, W]`` and int64 ``[N]``."""
    images = (data.images * 255).round().to(torch.uint8).numpy()
    archive = io.BytesIO()
    np.savez_compressed(archive, images=images, labels=data.labels.numpy())
    write_atomically(path, archive.getvalue())


def read_truth(folder: Path) -> dict[str, Truth]:
    """What ``zoo make`` measured of the models in ``folder``, by name; empty when nothing was made yet.

    Raises:
        DataError: the file cannot be read.
    """
    path = folder / "truth.json"
    if not path.exists():
        return {}
    try:
        return {truth.name: truth for truth in msgspec.json.decode(path.read_bytes(), type=list[Truth])}
    except (OSError, msgspec.MsgspecError) as error:
        raise DataError(f"{path} cannot be read: {error}.", "Fetch it again.") from None


def write_truth(folder: Path, truths: Mapping[str, Truth]) -> None:
    """Writes ``truth.json``, whole or not at all."""
    text = msgspec.json.format(msgspec.json.encode(list(truths.values())), indent=2)
    write_atomically(folder / "truth.json", text + b"\n")


def add_truth(folder: Path, truth: Truth, order: list[str]) -> None:
    """Puts one model's truth into ``truth.json``, which several processes may do at once.

    Args:
        folder: of the zoo.
        truth: of one model.
        order: names in the order in which the file is to have them.
    """
    with locked(folder):
        truths = {**read_truth(folder), truth.name: truth}
        names = [name for name in order if name in truths]
        write_truth(folder, {name: truths[name] for name in dict.fromkeys([*names, *truths])})


def write_cost(work: Path, cost: Cost) -> None:
    """Keeps, in the folder of a model in the making, what training it took, until it is measured."""
    write_atomically(work / "cost.json", msgspec.json.encode(cost))


def read_cost(work: Path) -> Cost | None:
    """What ``write_cost`` kept, if it did."""
    path = work / "cost.json"
    return msgspec.json.decode(path.read_bytes(), type=Cost) if path.exists() else None


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a folder for this process; the lock is gone with the process, however it ends.

    Args:
        folder: to hold; where it is gone, another process has just finished with it.
        wait: whether to wait for another process that holds it.

    Yields:
        Whether it is held.
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
