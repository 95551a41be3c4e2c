"""Adv-T, the second adaptive attack on RNP (Li et al., ICML 2023, section 4.2): a backdoor in useful filters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.attacks.badnets import PatchedNetwork
from bdprune.attacks.base import AttackSetting, shape_of
from bdprune.attacks.check import Count, NotNegative, Share, Whole
from bdprune.attacks.companion import running_statistics
from bdprune.data import CleanData, sample_per_class
from bdprune.loops import RecoverSettings, SweepSettings, UnlearnSettings, below, recover, sweep, unlearn
from bdprune.model import FilterGroup, Model
from bdprune.runtime import crop_and_flip, laid_out, training_layout


@dataclass(frozen=True)
class AdvT(PatchedNetwork):
    """Takes a network backdoored by BadNets, finds the filters that RNP would prune, and makes clean accuracy depend
    on their scale.

    A round (1) runs RNP as a defender would, on clean images: unlearning, a mask over the filters, the highest
    threshold that costs at most ``max_drop``; (2) fine-tunes all weights on clean images and poisoned replay, while
    the scales of the found filters carry noise: ``gamma (1 + d)``, ``|d| <= eps``, where d is one signed gradient step
    up the clean loss, new for each batch (as in ANP). Filters without their own norm carry no noise.

    The paper describes it in one sentence; this is our reading. Its figures are CA 88.56 and ASR 73.36.

    Args:
        rate: share of poisoned images in every batch of the fine-tuning.
        rounds: number of rounds.
        eps: largest relative change of a scale (ANP: 0.4).
        defence_images: number of clean images for RNP (the paper: 500), equally many of each class.
        max_drop: largest drop of clean accuracy for RNP's threshold (the paper: 0.02).
        least: smallest share of all filters that counts as found; if RNP's threshold finds fewer, the filters with the
            lowest masks are added (RNP, Table 8: about 1 % suffices).
        share: share of the training set to fine-tune on (ours).
        epochs: of fine-tuning in a round (ours).
        lr: of SGD with momentum 0.9 (ours).
        batch_size: images a step.
        padding: pixels of the random crop in fine-tuning.
        flip: mirror half of the images in fine-tuning.
    """

    rounds: Count = 2
    eps: NotNegative = 0.4
    defence_images: Count = 500
    max_drop: Share = 0.02
    least: Share = 0.01
    share: Share = 0.1
    epochs: Count = 3
    lr: NotNegative = 0.01
    batch_size: Count = 128
    padding: Whole = 4
    flip: bool = True

    kind: ClassVar[str] = "adv-t"
    needs_source: ClassVar[Literal["clean", "backdoored"] | None] = "backdoored"

    def finish(self, network: nn.Module, setting: AttackSetting, trigger: nn.Module) -> None:
        """Runs the rounds."""
        generator = torch.Generator().manual_seed(setting.seed)
        for number in range(self.rounds):
            model = Model(network.eval(), self.kind, setting.num_classes, shape_of(setting.images))
            found = self.find(model, setting, generator, setting.seed + number)
            noisy = scales(network, model.groups, found)
            self._fine_tune(network, noisy, setting, trigger, generator)
        network.eval()

    def find(self, model: Model, setting: AttackSetting, generator: torch.Generator, seed: int) -> dict[str, list[int]]:
        """Filters by group that RNP would prune in ``model``, at least ``least`` of all; ``model`` does not change."""
        index = sample_per_class(setting.labels, max(self.defence_images // setting.num_classes, 2), generator)
        clean = CleanData(setting.images[index].float() / 255, setting.labels[index])
        rest, held = clean.split(0.3, generator)
        unlearned = unlearn(model, rest, UnlearnSettings(), seed).model
        masks = recover(unlearned, rest, RecoverSettings(), seed).masks
        thresholds = [step / 20 for step in range(20)]
        swept = sweep(model, masks, [held], SweepSettings(thresholds, self.max_drop, stop_early=False))
        chosen = swept.highest(self.max_drop)
        levels = torch.cat(list(masks.values())).sort().values
        lowest = min(levels[max(round(self.least * len(levels)), 1) - 1].item(), 0.99)  # 1 is where masks start
        return below(masks, max(lowest, chosen.threshold) if chosen else lowest)

    def _fine_tune(
        self,
        network: nn.Module,
        noisy: list[tuple[nn.Parameter, Tensor]],
        setting: AttackSetting,
        trigger: nn.Module,
        generator: torch.Generator,
    ) -> None:
        network.train()
        device, layout = next(network.parameters()).device, training_layout(network)
        trigger = copy.deepcopy(trigger).to(device)
        optimizer = torch.optim.SGD(network.parameters(), self.lr, momentum=0.9)
        count = len(setting.labels)
        mine = torch.randperm(count, generator=generator)[: max(round(self.share * count), 1)]
        for _ in range(self.epochs):
            for part in mine[torch.randperm(len(mine), generator=generator)].split(self.batch_size):
                batch = crop_and_flip(setting.images[part], generator, self.padding, self.flip)
                images = laid_out(batch.to(device), layout).float() / 255
                labels = setting.labels[part].to(device)
                changes = adverse(network, noisy, images, labels, self.eps)
                # Only the pass without noise, in ``adverse``, updates the running statistics.
                with shifted(changes), running_statistics(network):
                    replayed, taught = self._replay(images, labels, trigger, setting.num_classes)
                    loss = functional.cross_entropy(network(replayed), taught)
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
        optimizer.zero_grad()

    def _replay(self, images: Tensor, labels: Tensor, trigger: nn.Module, num_classes: int) -> tuple[Tensor, Tensor]:
        """The batch with a share of its images triggered and relabelled."""
        wanted = self.goal(labels, num_classes)
        victims = (wanted != labels).nonzero().flatten()[: round(self.rate * len(labels))]
        images, labels = images.clone(), labels.clone()
        images[victims], labels[victims] = trigger(images[victims]), wanted[victims]
        return images, labels


def scales(
    network: nn.Module, groups: Sequence[FilterGroup], filters: Mapping[str, Sequence[int]]
) -> list[tuple[nn.Parameter, Tensor]]:
    """The scales of these filters' norms, and the filters' channels in them, int64."""
    found = []
    for group in groups:
        if group.norm is not None and filters.get(group.name):
            channels = torch.tensor(list(filters[group.name])) + group.norm.start
            found.append((network.get_parameter(f"{group.norm.name}.weight"), channels))
    return found


def adverse(
    network: nn.Module, noisy: list[tuple[nn.Parameter, Tensor]], images: Tensor, labels: Tensor, eps: float
) -> list[tuple[nn.Parameter, Tensor]]:
    """The change ``gamma d`` of each scale, ``d = eps sign(dCE / dd)`` on its channels and 0 on the others.

    It uses the network in its current mode and does not change its parameters.
    """
    if not noisy:
        return []
    loss = functional.cross_entropy(network(images), labels)
    gradients = torch.autograd.grad(loss, [scale for scale, _ in noisy])
    changes = []
    for (scale, channels), gradient in zip(noisy, gradients, strict=True):
        change = torch.zeros_like(scale)
        channels = channels.to(scale.device)
        # Along d = 0 the slope is gamma dCE/dgamma.
        change[channels] = (scale * eps * (scale * gradient).sign()).detach()[channels]
        changes.append((scale, change))
    return changes


@contextmanager
def shifted(changes: list[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Inside, parameters are changed; afterwards they have exactly their old values."""
    before = [scale.detach().clone() for scale, _ in changes]
    with torch.no_grad():
        for scale, change in changes:
            scale.add_(change)
    try:
        yield
    finally:
        with torch.no_grad():
            for (scale, _), value in zip(changes, before, strict=True):
                scale.copy_(value)
