"""Trains one clean or backdoored model: from a clean training set to its weights and its trigger."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bdprune.attacks import Attack, AttackSetting, shape_of
from bdprune.data import RawImages
from bdprune.errors import OptionError
from bdprune.loops import (
    Ascent,
    Checkpoint,
    IsolationSettings,
    Objective,
    Schedule,
    Trapping,
    digest,
    fit,
    isolate,
    machine,
)
from bdprune.model import build
from bdprune.runtime import seeded
from bdprune.zoo.manifest import Entry

Progress = Callable[[int, int, float], None]
"""Called with (steps done, total steps, loss)."""

Say = Callable[[str], None]
"""Called with one sentence about an event."""


@dataclass(frozen=True)
class Trained:
    """A network in eval mode, its trigger (None if it is clean), and the seconds that both took."""

    network: nn.Module
    trigger: nn.Module | None
    seconds: float


def train_model(
    entry: Entry,
    train: RawImages,
    work: Path,
    source: nn.Module | None = None,
    device: torch.device | None = None,
    progress: Progress = lambda step, steps, loss: None,
    say: Say = lambda text: None,
) -> Trained:
    """Trains one model; the same seed, threads and machine give the same weights.

    A killed run resumes from ``work``, which holds the poisoned training set and a checkpoint of the last minute.

    Args:
        entry: settings of the model.
        train: the clean training set.
        work: an empty folder, or the folder of the killed run.
        source: the network that the attack starts from, or that a clean model fine-tunes, in eval mode.
        device: where to run; the CPU by default.
        progress: called after every step.
        say: called with a sentence about each other event.

    Raises:
        OptionError: the attack does not work on these images.
        TrainingError: the training produced NaN or infinite values.
    """
    parts = [entry.attack, None if source is None else source.state_dict()]
    recipe = digest(*parts, *([entry.defence] if entry.defence else []))
    job = _Job(entry, work, device or torch.device("cpu"), recipe, progress, say)
    network = job.fresh(train)
    attack = entry.make_attack()
    if attack is None:
        if source is not None:
            _continue_from(network, source)
        job.train(network, train, None)
        return Trained(network.cpu(), None, job.seconds)
    if source is not None:
        source = source.to(job.device)
    setting = AttackSetting(train.images, train.labels, entry.num_classes, entry.seed, source, job.device)
    trigger, poisoned = job.poison(attack, setting)
    with seeded(entry.seed):
        attack.start(network, setting)
    if attack.trains:
        job.train(network, poisoned, attack.objective(setting, trigger))
    began = time.monotonic()
    with seeded(entry.seed):
        attack.finish(network.eval(), setting, trigger)
    job.seconds += time.monotonic() - began
    return Trained(network.cpu().eval(), trigger.cpu().eval(), job.seconds)


def _continue_from(network: nn.Module, source: nn.Module) -> None:
    """Copies the weights of ``source``, except those of a head for another number of classes."""
    own = network.state_dict()
    fitting = {name: value for name, value in source.state_dict().items() if own[name].shape == value.shape}
    network.load_state_dict(own | fitting)


@dataclass
class _Job:
    """The shared state of training one model; ``seconds`` counts the training time so far."""

    entry: Entry
    work: Path
    device: torch.device
    recipe: str
    progress: Progress
    say: Say
    seconds: float = 0.0

    def fresh(self, train: RawImages) -> nn.Module:
        """The network before training."""
        entry = self.entry
        with seeded(entry.seed):
            network = build(entry.arch, entry.num_classes, in_channels=train.images.shape[1], width=entry.width)
        return network.to(self.device)

    def poison(self, attack: Attack, setting: AttackSetting) -> tuple[nn.Module, RawImages]:
        """The trigger, and the poisoned training set."""
        checkpoint = self._checkpoint("poisoned")
        kept = checkpoint.load(digest(setting.images, setting.labels, setting.num_classes, setting.seed, machine()))
        with seeded(setting.seed):
            trigger = attack.new_trigger(shape_of(setting.images))
        if kept is None:
            with seeded(setting.seed):
                attack.learn(setting, trigger)
                poisoned = attack.poison(setting, trigger.cpu(), torch.Generator().manual_seed(setting.seed))
            images, labels = poisoned.images, poisoned.labels
            changed = (images != setting.images).flatten(1).any(1).nonzero().flatten()
            state = {"trigger": trigger.state_dict(), "changed": changed, "images": images[changed], "labels": labels}
            checkpoint.save(state)
        else:
            trigger.load_state_dict(kept["trigger"])
            images, labels = setting.images.clone(), kept["labels"]
            images[kept["changed"]] = kept["images"]
        self.seconds += checkpoint.seconds
        return trigger, RawImages(images, labels)

    def train(self, network: nn.Module, train: RawImages, objective: Objective | None) -> None:
        """Trains through all schedules, under the defence if there is one."""
        defence = self.entry.make_defence()
        if defence is not None:
            self._defend(network, train, defence)
            return
        parts = [(schedule, len(train.labels)) for schedule in self.entry.schedules]
        for index in range(len(parts)):
            self._fit(network, train, parts, index, objective, f"cycle-{index}")

    def _defend(self, network: nn.Module, train: RawImages, defence: IsolationSettings) -> None:
        """Anti-backdoor learning: isolates suspicious images, trains on the others, and unlearns the isolated ones."""
        schedules, every = self.entry.schedules, len(train.labels)
        count = defence.count(every)
        if count >= every:
            raise OptionError(f"{every} images are too few to isolate some of them.", "Give more training images.")
        parts = [(defence.first(schedules[0]), every), *((one, every - count) for one in schedules)]
        last = defence.last(schedules[-1], count)
        parts += [(last, count)] if last else []
        self._fit(network, train, parts, 0, Trapping(defence), "isolation")
        rest, isolated = isolate(network, train, count)
        for index in range(1, 1 + len(schedules)):
            self._fit(network, rest, parts, index, None, f"cycle-{index - 1}")
        if last:
            self._fit(network, isolated, parts, len(parts) - 1, Ascent(), "unlearning")

    def _fit(
        self,
        network: nn.Module,
        train: RawImages,
        parts: Sequence[tuple[Schedule, int]],
        index: int,
        objective: Objective | None,
        name: str,
    ) -> None:
        """Runs one of the parts of the training, each a schedule and its number of images, with a checkpoint."""
        steps = [schedule.steps(count) for schedule, count in parts]
        checkpoint = self._checkpoint(name)
        report = functools.partial(self._report, sum(steps[:index]), sum(steps))
        # Each part draws its own order and augmentation.
        seed = self.entry.seed + 1000 * index
        fit(network, train, parts[index][0], seed, report, objective, checkpoint)
        self.seconds += checkpoint.seconds

    def _checkpoint(self, name: str) -> Checkpoint:
        return Checkpoint(self.work / name, self.recipe, say=self.say)

    def _report(self, before: int, all_steps: int, step: int, _: int, loss: float) -> None:
        self.progress(before + step, all_steps, loss)
