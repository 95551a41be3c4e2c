"""The interface of attacks, which make backdoored models for tests and zoos.

An attack is a frozen dataclass of settings. Its trigger is a separate module that maps images to triggered images, so
that it can be saved and applied again without the attack's settings. Making a backdoored model takes six steps; an
attack overrides the steps that it changes:

    new_trigger -> learn -> poison -> start -> objective (every training step) -> finish
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from bdprune.attacks.check import Range, Share, check_label, check_ranges
from bdprune.errors import OptionError
from bdprune.loops import CrossEntropy, Objective

TriggerType = Literal["static", "input-dependent", "learned"]
"""One pattern for all images; a pattern that depends on the image; a pattern optimised on a model."""


Shape = tuple[int, int, int]
"""Channels, height and width of an image."""


@dataclass(frozen=True)
class AttackSetting:
    """The attacker's resources.

    Attributes:
        images: the clean training images, uint8 ``[N, C, H, W]``.
        labels: ``[N]`` int64.
        num_classes: K.
        seed: of all random numbers of the attack.
        source: a trained network of the same architecture, images in [0, 1] -> logits, in eval mode, for attacks with
            ``needs_source``, which must not change it.
        device: where learning runs.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    seed: int
    source: nn.Module | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Poisoned:
    """A poisoned training set.

    Attributes:
        images: uint8 ``[N, C, H, W]``, a copy.
        labels: ``[N]`` int64, a copy.
        triggered: indices of the images with the trigger that teach the backdoor.
        covers: indices of the images with all or part of the trigger that keep their label.
    """

    images: Tensor
    labels: Tensor
    triggered: Tensor
    covers: Tensor


def draw(candidates: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Indices of ``round(rate * N)`` candidates, without replacement.

    Args:
        candidates: ``[N]`` bool, the images that may be drawn.
        rate: share of all N images, in [0, 1].
        generator: source of randomness.

    Raises:
        OptionError: there are too few candidates.
    """
    count = round(rate * len(candidates))
    index = candidates.nonzero().flatten()
    if count > len(index):
        raise OptionError(
            f"A rate of {rate} needs {count} images, but only {len(index)} of {len(candidates)} may be poisoned.",
            "Give a lower rate.",
        )
    return index[torch.randperm(len(index), generator=generator)[:count]]


def draw_covers(victims: Tensor, total: int, rate: float, generator: torch.Generator) -> Tensor:
    """Indices of ``round(rate * total)`` of ``total`` images, of any label, but not among ``victims``.

    Raises:
        OptionError: too few images are left.
    """
    free = torch.ones(total, dtype=torch.bool)
    free[victims] = False
    return draw(free, rate, generator)


def saturate(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8; values outside are clipped and never wrap around."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def unpoisoned(setting: AttackSetting) -> Poisoned:
    """The unchanged training set, for attacks that trigger images in the batch or train nothing."""
    none = torch.empty(0, dtype=torch.int64)
    return Poisoned(setting.images.clone(), setting.labels.clone(), none, none)


@dataclass(frozen=True)
class Attack(ABC):
    """A backdoor attack.

    Args:
        target: target label; None is all-to-all: the target is the label after the true one.
        rate: share of the training set to poison, in [0, 1].

    Raises:
        OptionError: a setting is out of range. ``new_trigger`` raises it for a trigger larger than the image, ``goal``
            and ``poison`` for a target that the images do not have.
    """

    target: Annotated[int | None, Range(0)]
    rate: Share = 0.1

    kind: ClassVar[str]
    trigger_type: ClassVar[TriggerType] = "static"
    needs_source: ClassVar[Literal["clean", "backdoored"] | None] = None
    trains: ClassVar[bool] = True
    """False for attacks that go from ``start`` to ``finish`` without a training step between them."""

    def __post_init__(self) -> None:
        """Checks the settings."""
        check_ranges(self)

    @property
    def sources(self) -> tuple[int, ...]:
        """Labels of the images that the trigger works on; empty for all."""
        return ()

    @property
    def only_poisons(self) -> bool:
        """Whether all that it does is to poison the training set, so that a defender can run the training."""
        plain = Attack.start, Attack.objective, Attack.finish
        own = type(self).start, type(self).objective, type(self).finish
        return self.trains and own == plain

    @property
    def family(self) -> str:
        """The kind; attacks with several targets are families of their own."""
        return self.kind if self.target is not None else f"{self.kind}, all to all"

    @property
    def backdoor(self) -> Attack:
        """The attack that made the backdoor: another one for an attack that hides the backdoor of its source."""
        return self

    @abstractmethod
    def new_trigger(self, shape: Shape) -> nn.Module:
        """The trigger for images of ``shape`` (C, H, W): ``[N, C, H, W]`` in [0, 1] -> triggered images of this shape,
        at full strength.

        It is complete for static attacks. For others it is untrained: ``load_state_dict`` restores a learned trigger,
        because its buffers and parameters hold everything that it learns.
        """

    def learn(self, setting: AttackSetting, trigger: nn.Module) -> None:
        """Learns the trigger in place, before the network's training; static attacks do nothing."""
        return

    def goal(self, labels: Tensor, num_classes: int) -> Tensor:
        """The attacker's label for triggered images of each label. Images that already have it never count as a
        success.
        """
        if self.target is None:
            return (labels + 1) % num_classes
        check_label("target", self.target, num_classes)
        return torch.full_like(labels, self.target)

    def poison(self, setting: AttackSetting, trigger: nn.Module, generator: torch.Generator) -> Poisoned:
        """Dirty labels: triggers and relabels a seeded share of the images whose label is not their goal. Values are
        clipped to [0, 1], then rounded to whole bytes.
        """
        wanted = self.goal(setting.labels, setting.num_classes)
        victims = draw(wanted != setting.labels, self.rate, generator)
        images, labels = setting.images.clone(), setting.labels.clone()
        images[victims] = saturate(apply_trigger(trigger, images[victims]))
        labels[victims] = wanted[victims]
        return Poisoned(images, labels, victims, torch.empty(0, dtype=torch.int64))

    def start(self, network: nn.Module, setting: AttackSetting) -> None:
        """Changes the new ``network`` in place before training; by default it does nothing."""
        return

    def objective(self, setting: AttackSetting, trigger: nn.Module) -> Objective:
        """The objective of every training step. It also trains a trigger that is learned along with the network."""
        return CrossEntropy()

    def finish(self, network: nn.Module, setting: AttackSetting, trigger: nn.Module) -> None:
        """Changes the trained ``network`` in place; by default it does nothing."""
        return


@dataclass(frozen=True)
class CleanLabel(Attack):
    """An attack that triggers images of its target class, which keep their label.

    Args:
        target: target label; never None, because the poisoned images keep their labels.
        rate: share of the whole training set to poison (RNP, Table 6: 0.08, which is 80 % of one class of ten).
    """

    rate: Share = 0.08

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is None:
            raise OptionError("A clean-label attack has no all-to-all form.", "Give a target label.")

    def poison(self, setting: AttackSetting, trigger: nn.Module, generator: torch.Generator) -> Poisoned:
        """Triggers a seeded share of the target class. Values are clipped to [0, 1], then rounded to whole bytes."""
        assert self.target is not None
        check_label("target", self.target, setting.num_classes)
        victims = draw(setting.labels == self.target, self.rate, generator)
        images = setting.images.clone()
        images[victims] = saturate(
            self.poison_images(setting.images[victims].float() / 255, setting, trigger, generator)
        )
        return Poisoned(images, setting.labels.clone(), victims, torch.empty(0, dtype=torch.int64))

    def poison_images(
        self, images: Tensor, setting: AttackSetting, trigger: nn.Module, generator: torch.Generator
    ) -> Tensor:
        """The poisoned versions of images ``[N, C, H, W]`` in [0, 1]; by default it applies the trigger."""
        return apply_trigger(trigger, images)


@torch.no_grad()
def apply_trigger(trigger: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """Triggered copies, float32 in [0, 1] (clipped), of images ``[N, C, H, W]`` that are uint8 or in [0, 1]."""
    floats = images.float() / 255 if images.dtype == torch.uint8 else images
    return torch.cat([trigger(batch).clamp(0, 1) for batch in floats.split(batch_size)]) if len(floats) else floats


def shape_of(images: Tensor) -> Shape:
    """Channels, height and width of images ``[N, C, H, W]``."""
    _, channels, height, width = images.shape
    return channels, height, width
