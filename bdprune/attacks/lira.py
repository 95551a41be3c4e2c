"""LIRA (Doan et al., ICCV 2021): an invisible trigger that is learned along with the network."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.attacks.base import AttackSetting, Shape, TriggerType
from bdprune.attacks.check import Count, NotNegative, Share
from bdprune.attacks.companion import Companion, InBatch, TriggerObjective, full_precision, quota, running_statistics
from bdprune.attacks.generators import Change


@dataclass(frozen=True)
class LIRA(InBatch):
    """``x' = clip(x + eps tanh T(x))`` with a U-Net T, in two stages; dirty labels.

    The training set stays clean; a share of every batch is triggered. In the first stage, T and the network alternate.
    T minimises the cross-entropy between the network's outputs on T's images and the attacker's labels. The network
    minimises ``alpha CE`` on the clean batch and ``(1 - alpha) CE`` on images that a delayed copy of T has triggered,
    so that the network does not follow every step of T. In the second stage, T is fixed and only the network is
    trained.

    The form, alpha and the stages are the authors'. Ours: ``eps`` is in pixel units of [0, 1] (the authors' 0.01 is in
    the units of normalised images, and the defaults in their code differ); the shares of stages, the lag and Adam's
    learning rate fit short schedules (the authors: 50 and 250 epochs, an epoch, 1e-4); and only a share of a batch is
    triggered, to save time (the authors: all of it). Alpha therefore weights single images: the loss is their weighted
    mean, which equals the authors' if all are triggered.

    Args:
        target: target label; None for all-to-all.
        rate: triggered images, in addition to the clean batch, as a share of the batch.
        eps: largest change of a pixel, in (0, 1].
        alpha: weight of a clean image in the network's loss, in [0, 1]; a triggered image has 1 - alpha.
        first_share: share of the first stage in the schedule.
        lag: number of steps between updates of the copy of T.
        lr: Adam's learning rate of T.
        width: channels of T at full resolution.
    """

    eps: Share = 8 / 255
    alpha: Share = 0.5
    first_share: Share = 0.4
    lag: Count = 100
    lr: NotNegative = 1e-3
    width: Count = 16

    kind: ClassVar[str] = "lira"
    trigger_type: ClassVar[TriggerType] = "learned"

    def new_trigger(self, shape: Shape) -> Change:
        return Change(shape[0], self.width, self.eps)

    def objective(self, setting: AttackSetting, trigger: nn.Module) -> InvisibleObjective:
        assert isinstance(trigger, Change)
        return InvisibleObjective(self, trigger.to(setting.device), setting.num_classes)


class InvisibleObjective(TriggerObjective):
    """The network's loss on clean and triggered images; in the first stage, T takes its own step before."""

    def __init__(self, attack: LIRA, trigger: Change, num_classes: int) -> None:
        self.attack, self.trigger, self.num_classes = attack, trigger, num_classes
        self._companion = Companion(trigger, attack.lr)
        self._lagging = copy.deepcopy(trigger)
        super().__init__(trigger=trigger, lagging=self._lagging, companion=self._companion)

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor, done: float) -> Tensor:
        victims, wanted = self.victims(images, labels)
        learning = done < self.attack.first_share
        if learning and len(victims):
            self._companion.descend(self.trigger_loss(network, victims, wanted))
        if not learning or self._steps % self.attack.lag == 0:
            self._lagging.load_state_dict(self.trigger.state_dict())
        self._steps += 1
        with torch.no_grad(), full_precision(images):
            triggered = self._lagging(victims) if len(victims) else victims
        logits = network(torch.cat([images, triggered])).float()
        losses = functional.cross_entropy(logits, torch.cat([labels, wanted]), reduction="none")
        weights = torch.full_like(losses, self.attack.alpha)
        weights[len(labels) :] = 1 - self.attack.alpha
        return (weights * losses).sum() / weights.sum()

    def victims(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The first images of the batch whose label is not the attacker's, and the attacker's labels."""
        wanted = self.attack.goal(labels, self.num_classes)
        index = (wanted != labels).nonzero().flatten()
        index = index[: quota(self._steps, self.attack.rate, len(images))]
        return images[index], wanted[index]

    def trigger_loss(self, network: nn.Module, images: Tensor, wanted: Tensor) -> Tensor:
        """Cross-entropy between the network's outputs on T's images and the attacker's labels, a scalar.

        The batch norms use their running statistics, because the statistics of a batch of only triggered images differ
        from those in later use.
        """
        with full_precision(images):
            triggered = self.trigger(images)
        with running_statistics(network):
            return functional.cross_entropy(network(triggered).float(), wanted)
