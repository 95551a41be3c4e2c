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
from bdprune.errors import OptionError
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


def draw(candidates: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Indices of ``round(rate * N)`` candidates, without replacement.

    Args:
        candidates: ``[N]`` bool, the images that may be drawn.
        rate: share of all N images, in [0, 1].
        generator: source of randomness.

    Raises:
        OptionError: there are fewer candidates than asked for.
    """
    count = round(rate * len(candidates))
    index = candidates.nonzero().flatten()
    if count > len(index):
        raise OptionError(
            f"A rate of {rate} asks for {count} images, only {len(index)} of {len(candidates)} may be poisoned.",
            "Give a lower rate.",
        )
    return index[torch.randperm(len(index), generator=generator)[:count]]


def draw_covers(victims: Tensor, total: int, rate: float, generator: torch.Generator) -> Tensor:
    """Indices of ``round(rate * total)`` of ``total`` images, of any label, none of them among ``victims``.

    Raises:
        OptionError: too few images are left.
    """
    free = torch.ones(total, dtype=torch.bool)
    free[victims] = False
    return draw(free, rate, generator)


def saturate(images: Tensor) -> Tensor:
    """Whole bytes, uint8, of images in [0, 1]; what lies outside is clipped and never wraps around."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


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


@dataclass(frozen=True)
class CleanLabel(Attack):
    """An attack that triggers images of its target class, which keep their label.

    Args:
        target: label that the trigger calls; never None: images of all classes would teach nothing by their own label.
        rate: share of the whole training set that is poisoned (RNP, Table 6: 0.08, which is 80 % of one class of ten).
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
        images[victims] = saturate(self.dress(setting.images[victims].float() / 255, setting, trigger, generator))
        return Poisoned(images, setting.labels.clone(), victims, torch.empty(0, dtype=torch.int64))

    def dress(self, images: Tensor, setting: AttackSetting, trigger: nn.Module, generator: torch.Generator) -> Tensor:
        """What the drawn images ``[N, C, H, W]`` in [0, 1] become; by default they are triggered."""
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
