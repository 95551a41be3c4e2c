"""What an attack is. Attacks exist to make models of known truth, for tests and zoos.

An attack is a frozen dataclass of settings. Its trigger is a module of its own, images in and triggered images out, so
that it can be saved and applied again without the settings it was learned with. Making a backdoored model goes
through six steps, of which an attack overrides those that it changes:

    new_trigger -> learn -> poison -> start -> objective (every training step) -> finish
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from bdprune.attacks.check import Range, Share, check_label, check_ranges
from bdprune.attacks.poison import draw, saturate
from bdprune.loops import CrossEntropy, Objective

TriggerType = Literal["static", "input-dependent", "learned"]
"""One pattern for all images; one that depends on the image; one that was optimised on a model."""


Shape = tuple[int, int, int]
"""Channels, height and width of an image."""


@dataclass(frozen=True)
class AttackSetting:
    """What the attacker has.

    Attributes:
        images: the clean training images, uint8 ``[N, C, H, W]``.
        labels: ``[N]`` int64.
        num_classes: K.
        seed: of everything random in the attack.
        source: a trained network of the same architecture, images in [0, 1] -> logits, in eval mode; given to attacks
            with ``needs_source``, which must not change it.
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
    """A training set as the attacker hands it over.

    Attributes:
        images: uint8 ``[N, C, H, W]``, a copy.
        labels: ``[N]`` int64, a copy.
        triggered: indices of the images that carry the trigger and teach the backdoor.
        covers: indices of the images that carry it, whole or in part, with the label they always had.
    """

    images: Tensor
    labels: Tensor
    triggered: Tensor
    covers: Tensor


def unpoisoned(setting: AttackSetting) -> Poisoned:
    """The training set as it is, for attacks that trigger images in the batch or train nothing."""
    none = torch.empty(0, dtype=torch.int64)
    return Poisoned(setting.images.clone(), setting.labels.clone(), none, none)


@dataclass(frozen=True)
class Attack(ABC):
    """A backdoor attack.

    Args:
        target: label that the trigger calls; None is all-to-all: the trigger calls the label that follows the true one.
        rate: share of the training set that is poisoned, in [0, 1].

    Raises:
        OptionError: a setting is out of its range; so do ``new_trigger`` for a trigger that is larger than the image
            and ``goal`` and ``poison`` for a target that is no label of the images.
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

    @abstractmethod
    def new_trigger(self, shape: Shape) -> nn.Module:
        """The trigger for images of ``shape`` (C, H, W): ``[N, C, H, W]`` in [0, 1] -> the same, triggered at full
        strength.

        Complete for static attacks; for the others before learning, so that ``load_state_dict`` of what a learned one
        saved makes it the same trigger. All that it has learned lies in its buffers and parameters.
        """

    def learn(self, setting: AttackSetting, trigger: nn.Module) -> None:
        """Learns what the trigger needs before any training, in place; static attacks have nothing to learn."""
        return

    def goal(self, labels: Tensor, num_classes: int) -> Tensor:
        """Label that the attacker wants for a triggered image of every label; images where it is the true one never
        count as a success.
        """
        if self.target is None:
            return (labels + 1) % num_classes
        check_label("target", self.target, num_classes)
        return torch.full_like(labels, self.target)

    def poison(self, setting: AttackSetting, trigger: nn.Module, generator: torch.Generator) -> Poisoned:
        """Dirty labels: a seeded share of the images that have another goal than their label is triggered and
        relabelled. Values beyond [0, 1] are clipped, then rounded to whole bytes.
        """
        wanted = self.goal(setting.labels, setting.num_classes)
        victims = draw(wanted != setting.labels, self.rate, generator)
        images, labels = setting.images.clone(), setting.labels.clone()
        images[victims] = saturate(apply_trigger(trigger, images[victims]))
        labels[victims] = wanted[victims]
        return Poisoned(images, labels, victims, torch.empty(0, dtype=torch.int64))

    def start(self, network: nn.Module, setting: AttackSetting) -> None:
        """Changes the fresh ``network`` in place before training; by default it stays as it was initialised."""
        return

    def objective(self, setting: AttackSetting, trigger: nn.Module) -> Objective:
        """What every training step minimises. A trigger that is trained beside the network is trained in it."""
        return CrossEntropy()

    def finish(self, network: nn.Module, setting: AttackSetting, trigger: nn.Module) -> None:
        """Changes the trained ``network`` in place; by default there is nothing left to do."""
        return


@torch.no_grad()
def apply_trigger(trigger: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """Triggered copies, float32 in [0, 1] (clipped), of images ``[N, C, H, W]`` that are uint8 or in [0, 1]."""
    floats = images.float() / 255 if images.dtype == torch.uint8 else images
    return torch.cat([trigger(batch).clamp(0, 1) for batch in floats.split(batch_size)]) if len(floats) else floats


def shape_of(images: Tensor) -> Shape:
    """Channels, height and width of images ``[N, C, H, W]``."""
    _, channels, height, width = images.shape
    return channels, height, width
