"""Anti-backdoor learning (ABL): a training on a poisoned set that isolates suspicious images and unlearns them.

Source: Li et al., Anti-Backdoor Learning: Training Clean Models on Poisoned Data, NeurIPS 2021, arXiv 2110.11571.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.data import RawImages
from bdprune.errors import OptionError
from bdprune.loops.fitting import Schedule

_BATCH = 500  # images in one forward pass


@dataclass(frozen=True)
class IsolationSettings:
    """How to isolate and unlearn suspicious images of a training set.

    Args:
        loss: how the losses are held at ``level`` in the first part. ``mean_ascent`` is the local gradient ascent of
            the published code, sign(l - level) l for the mean loss l of a batch: images that are learned fast, such as
            triggered ones, fall below the level. ``ascent`` is that of the paper, with the loss of every image, which
            holds these at the level, too. ``flooding`` is |l - level| + level for the mean of a batch.
        level: cross-entropy that the first part of the training stays at, in nats, above 0.
        epochs: passes of the first part, at the highest learning rate of the first schedule.
        share: share of the images that are isolated, those with the lowest loss, in (0, 1); at least one image.
        unlearn_lr: learning rate of the ascent on the isolated images.
        unlearn_epochs: passes of this ascent over the isolated images; 0 only leaves them out.

    Raises:
        OptionError: a number is out of its range, or an unknown loss.
    """

    loss: Literal["mean_ascent", "ascent", "flooding"] = "mean_ascent"
    level: float = 0.5
    epochs: int = 20
    share: float = 0.01
    unlearn_lr: float = 5e-4
    unlearn_epochs: int = 5

    def __post_init__(self) -> None:
        fits = {
            "loss": self.loss in ("mean_ascent", "ascent", "flooding"),
            "level": 0 < self.level < math.inf,
            "epochs": self.epochs >= 1,
            "share": 0 < self.share < 1,
            "unlearn_lr": 0 < self.unlearn_lr < math.inf,
            "unlearn_epochs": self.unlearn_epochs >= 0,
        }
        for name, right in fits.items():
            if not right:
                raise OptionError(
                    f"The defence's {name} is out of range: {getattr(self, name)}.",
                    "Give mean_ascent, ascent or flooding as loss, a share below 1, 1 epoch or more, numbers above 0.",
                )

    def count(self, images: int) -> int:
        """How many of the images are isolated."""
        return max(round(self.share * images), 1)

    def first(self, schedule: Schedule) -> Schedule:
        """The schedule of the first part: a constant learning rate."""
        return replace(schedule, epochs=self.epochs, policy="steps", milestones=())

    def last(self, schedule: Schedule, images: int) -> Schedule | None:
        """The schedule of the ascent on so many isolated images; None if there is no ascent."""
        if not self.unlearn_epochs:
            return None
        return replace(
            schedule,
            epochs=self.unlearn_epochs,
            peak_lr=self.unlearn_lr,
            batch_size=min(schedule.batch_size, images),
            policy="steps",
            milestones=(),
        )


class _Stateless:
    """The part of an objective (:class:`bdprune.loops.Objective`) that has no state."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class Trapping(_Stateless):
    """The loss of the first part: it keeps images that are learned fast, such as triggered ones, at a low loss.

    Other images cannot fall to the level as fast, so triggered images have the lowest losses after a few epochs.

    Args:
        settings: the kind of the loss and its level.
    """

    def __init__(self, settings: IsolationSettings) -> None:
        self._kind, self._level = settings.loss, settings.level

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor, done: float) -> Tensor:
        losses = functional.cross_entropy(network(images).float(), labels, reduction="none")
        if self._kind == "mean_ascent":
            mean = losses.mean()
            return torch.sign(mean.detach() - self._level) * mean
        if self._kind == "flooding":
            return (losses.mean() - self._level).abs() + self._level
        return (torch.sign(losses.detach() - self._level) * losses).mean()


class Ascent(_Stateless):
    """The negative cross-entropy, which unlearns the images."""

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor, done: float) -> Tensor:
        return -functional.cross_entropy(network(images).float(), labels)


@torch.no_grad()
def isolate(network: nn.Module, train: RawImages, count: int) -> tuple[RawImages, RawImages]:
    """The training set in two parts: the others, and the ``count`` images with the lowest losses, in their order.

    Args:
        network: images in [0, 1] -> logits; it is used in eval mode.
        train: the training set.
        count: at least 1, and less than the number of images.
    """
    device = next(network.parameters()).device
    network.eval()
    losses = torch.cat(
        [
            functional.cross_entropy(
                network(images.to(device).float() / 255).float(), labels.to(device), reduction="none"
            )
            for images, labels in zip(train.images.split(_BATCH), train.labels.split(_BATCH), strict=True)
        ]
    ).cpu()
    easy = torch.zeros(len(losses), dtype=torch.bool)
    easy[torch.argsort(losses, stable=True)[:count]] = True
    rest, isolated = (RawImages(train.images[part], train.labels[part], train.class_names) for part in (~easy, easy))
    return rest, isolated
