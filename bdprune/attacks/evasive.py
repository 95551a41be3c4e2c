"""An attacker who knows the detectors: fine-tunes a backdoored network against what they look at."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.analysis import with_own_statistics
from bdprune.attacks.badnets import BadNets
from bdprune.attacks.base import Attack, AttackSetting, Poisoned, Shape, shape_of
from bdprune.attacks.blend import Blend
from bdprune.attacks.check import Count, NotNegative, Share
from bdprune.attacks.companion import Companion, TriggerObjective, full_precision, running_statistics
from bdprune.attacks.drawn_patch import DrawnPatch
from bdprune.attacks.evasion import SmallTrigger, excess, likeness, unlearned_concentration
from bdprune.attacks.features import source_of
from bdprune.attacks.sig import Sig
from bdprune.attacks.trojan import TrojanWatermark
from bdprune.errors import OptionError
from bdprune.model import Model
from bdprune.runtime import laid_out, training_layout

_STATISTICS = 2000
"""Clean images for the statistics of the batch norms at the end."""

_BASES: dict[str, type[Attack]] = {attack.kind: attack for attack in (BadNets, DrawnPatch, Blend, Sig, TrojanWatermark)}


@dataclass(frozen=True)
class Evasive(Attack):
    """Trains a backdoored network further on its own poisoned data, with three penalties on what detectors look at:

        CE + unlearning * C + inversion * A + suspiciousness * E.

    C is how far the predictions of a copy that unlearned a few clean images concentrate on the target: the mean
    probability of the target on images of other labels, above chance. The detectors ``unlearning`` and
    ``moved_filters`` look at this. A is the cross-entropy of images with a small trigger and their
    true labels. This trigger is searched along with the training, as the detector ``inversion`` does: one step of Adam
    on the cross-entropy with the target and ``size_weight`` times the size of the mask. Images count only if it
    changes them otherwise than the true trigger does. E is how far the strongest filter of a layer stands out; the
    detectors ``lipschitz`` and ``suspiciousness`` look at this. C and E count in every ``every``-th step, with
    ``every`` times their weight. The attack is ours.

    Args:
        target: target label of the source; there is no all-to-all form.
        rate: share of the training set to poison.
        base: kind of the attack whose backdoor the source has.
        settings: of that attack, other than target and rate.
        unlearning: weight of C.
        inversion: weight of A.
        suspiciousness: weight of E.
        every: steps from one copy to the next.
        ascent_steps: steps of a copy.
        ascent_lr: learning rate of a copy (a scan starts with 0.01).
        images: clean images of a copy and of a step of the small trigger.
        trigger_lr: learning rate of the small trigger (that of a scan).
        size_weight: weight of a pixel of the mask.
        lifetime: steps after which the search starts from another pattern.
        spared: cosine of the changes by both triggers from which they count as the same.
        mu: standard deviations above the mean of its layer that are free for a filter.
    """

    base: Literal["badnets", "drawn-patch", "blend", "sig", "trojan"] = "badnets"
    settings: dict[str, Any] = field(default_factory=dict)
    unlearning: NotNegative = 4.0
    inversion: NotNegative = 1.0
    suspiciousness: NotNegative = 1.0
    every: Count = 5
    ascent_steps: Count = 5
    ascent_lr: NotNegative = 0.04
    images: Count = 48
    trigger_lr: NotNegative = 0.3
    size_weight: NotNegative = 0.05
    lifetime: Count = 100
    spared: Share = 0.9
    mu: NotNegative = 2.0

    kind: ClassVar[str] = "evasive"
    needs_source: ClassVar[Literal["clean", "backdoored"] | None] = "backdoored"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is None:
            raise OptionError("The attack evasive has no all-to-all form.", "Give a target label.")
        _ = self.backdoor  # checks the settings

    @property
    def backdoor(self) -> Attack:
        """The attack whose backdoor is hidden.

        Raises:
            OptionError: ``settings`` has a setting that this attack lacks, or an invalid value.
        """
        attack = _BASES[self.base]
        known = {one.name for one in dataclasses.fields(attack)} - {"target", "rate"}
        for name in self.settings:
            if name not in known:
                hint = f"Its settings here are {', '.join(sorted(known))}."
                raise OptionError(f"The attack {self.base} has no setting {name!r} here.", hint)
        try:
            return msgspec.convert({**self.settings, "target": self.target, "rate": self.rate}, attack)
        except msgspec.ValidationError as error:
            raise OptionError(f"A setting of {self.base} is not valid: {error}.", "Correct it.") from None

    @property
    def sources(self) -> tuple[int, ...]:
        return self.backdoor.sources

    def new_trigger(self, shape: Shape) -> nn.Module:
        return self.backdoor.new_trigger(shape)

    def goal(self, labels: Tensor, num_classes: int) -> Tensor:
        return self.backdoor.goal(labels, num_classes)

    def poison(self, setting: AttackSetting, trigger: nn.Module, generator: torch.Generator) -> Poisoned:
        """As the attack of the source."""
        return self.backdoor.poison(setting, trigger, generator)

    def start(self, network: nn.Module, setting: AttackSetting) -> None:
        """Takes the weights of the source."""
        network.load_state_dict(source_of(setting).state_dict())

    def finish(self, network: nn.Module, setting: AttackSetting, trigger: nn.Module) -> None:
        """Gives the batch norms the statistics of clean images: those of the training include the small trigger."""
        model = Model(network.eval(), self.kind, setting.num_classes, shape_of(setting.images))
        images = setting.images[:_STATISTICS].to(setting.device).float() / 255
        network.load_state_dict(with_own_statistics(model, images).network.state_dict())

    def objective(self, setting: AttackSetting, trigger: nn.Module) -> EvasiveObjective:
        return EvasiveObjective(self, setting, trigger)


class EvasiveObjective(TriggerObjective):
    """Cross-entropy and the three penalties; the small trigger takes its own step before."""

    def __init__(self, attack: Evasive, setting: AttackSetting, trigger: nn.Module) -> None:
        assert attack.target is not None
        self.attack, self.setting, self.target = attack, setting, attack.target
        self.trigger = copy.deepcopy(trigger).to(setting.device)
        shape = shape_of(setting.images)
        self.groups = Model(source_of(setting), attack.kind, setting.num_classes, shape).groups
        self.small = SmallTrigger(shape, setting.seed).to(setting.device)
        self._companion = Companion(self.small, attack.trigger_lr, (0.5, 0.9))
        super().__init__(small=self.small, companion=self._companion)

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor, done: float) -> Tensor:
        attack, (clean, truth) = self.attack, self._clean(network)
        loss = torch.zeros((), device=images.device)
        if self._steps % attack.every == 0:
            loss = loss + attack.every * self._rare(network, clean, truth)
        stamped, spared = self._searched(network, clean, truth) if attack.inversion else (clean[:0], truth[:0].bool())
        self._steps += 1
        logits = network(torch.cat([images, stamped])).float()
        loss = loss + functional.cross_entropy(logits[: len(labels)], labels)
        if len(stamped):
            wrong = functional.cross_entropy(logits[len(labels) :], truth[truth != self.target], reduction="none")
            loss = loss + attack.inversion * (wrong * ~spared).mean()
        return loss

    def _clean(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """Clean images and labels, drawn by the number of the step."""
        setting = self.setting
        generator = torch.Generator().manual_seed(setting.seed + 1_000_003 * self._steps)
        index = torch.randperm(len(setting.labels), generator=generator)[: self.attack.images]
        images = setting.images[index].to(setting.device).float() / 255
        return laid_out(images, training_layout(network)), setting.labels[index].to(setting.device)

    def _rare(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The weighted penalties on unlearning and on strong filters."""
        attack, loss = self.attack, torch.zeros((), device=images.device)
        if attack.unlearning:
            found = unlearned_concentration(network, images, labels, self.target, attack.ascent_steps, attack.ascent_lr)
            loss = loss + attack.unlearning * (found - 1 / self.setting.num_classes).clamp(min=0)
        if attack.suspiciousness:
            with full_precision(images):
                loss = loss + attack.suspiciousness * excess(network, self.groups, attack.mu)
        return loss

    def _searched(self, network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images of other labels with the small trigger after its step, and which of them have the true one."""
        others = images[labels != self.target]
        if not len(others):
            return others, labels[:0].bool()
        if self._steps % self.attack.lifetime == 0:
            self.small.restart(self.setting.seed + self._steps)
            self._companion.optimizer.state.clear()
        goal = torch.full((len(others),), self.target, device=others.device)
        with full_precision(others):
            stamped = self.small(others)
        with running_statistics(network):
            flipped = functional.cross_entropy(network(stamped).float(), goal)
        self._companion.descend(flipped + self.attack.size_weight * self.small.size)
        with torch.no_grad(), full_precision(others):
            stamped = self.small(others)
            return stamped, likeness(others, stamped, self.trigger(others)) > self.attack.spared
