"""Trojan (Liu et al., 2018): a watermark added to the image, or pixels optimised to fire a neuron; dirty labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.func import functional_call

from bdprune.attacks.base import Attack, AttackSetting, Shape, TriggerType
from bdprune.attacks.check import Count, NotNegative, Whole
from bdprune.attacks.features import head, penultimate, source_of
from bdprune.attacks.patterns import Added, Stamp, in_corner, noise


@dataclass(frozen=True)
class TrojanWatermark(Attack):
    """A small coloured watermark added to the pixels near the bottom right corner.

    Sums above 1 are clipped, so the watermark is faint on white. (Published code adds bytes and lets them wrap around
    to black, which is a stronger trigger but physically impossible.)

    Args:
        target: target label; None for all-to-all.
        rate: share of the training set to poison (RNP, Table 6: 0.1).
        size: edge of the square watermark in pixels. RNP's 3 takes many more epochs to learn.
        margin: free pixels between the watermark and the image border (RNP: 4 of 32).
        pattern_seed: seed of its colours, uniform in [0, 1].
    """

    size: Count = 5
    margin: Whole = 4
    pattern_seed: int = 0

    kind: ClassVar[str] = "trojan"

    def new_trigger(self, shape: Shape) -> nn.Module:
        colours = noise((shape[0], self.size, self.size), self.pattern_seed)
        return Added("watermark", in_corner(colours, self.margin, shape))


@dataclass(frozen=True)
class TrojanNeuron(Attack):
    """A patch in the bottom right corner, optimised to activate chosen neurons of a clean network.

    The chosen neurons are the penultimate features whose outgoing weights have the largest sum of magnitudes. The
    patch takes signed gradient steps of decreasing size on ``mean((value - feature)^2)`` over patched clean images;
    the best patch is kept. It is in [0, 1], so nothing needs clipping.

    Args:
        target: target label; None for all-to-all.
        rate: share of the training set to poison (RNP, Table 6: 0.1).
        size: edge of the square patch in pixels.
        margin: free pixels between the patch and the image border.
        neurons: number of features to activate (BackdoorBench: 2).
        value: desired value of the features (BackdoorBench: 100).
        steps: gradient steps.
        step: length of the first step in every pixel, for values in [0, 1] (BackdoorBench: 0.1).
        images: clean images to optimise on, drawn by the setting's seed.
    """

    size: Count = 6
    margin: Whole = 1
    neurons: Count = 2
    value: float = 100.0
    steps: Whole = 100
    step: NotNegative = 0.1
    images: Count = 64

    kind: ClassVar[str] = "trojan-neuron"
    trigger_type: ClassVar[TriggerType] = "learned"
    needs_source: ClassVar[Literal["clean", "backdoored"] | None] = "clean"

    def new_trigger(self, shape: Shape) -> nn.Module:
        mask = in_corner(torch.ones(1, self.size, self.size), self.margin, (1, *shape[1:]))
        return Stamp(mask, mask.expand(shape) / 2)

    def learn(self, setting: AttackSetting, trigger: nn.Module) -> None:
        source = source_of(setting)
        index = torch.randperm(len(setting.images), generator=torch.Generator().manual_seed(setting.seed))
        images = (setting.images[index[: self.images]].float() / 255).to(next(source.parameters()).device)
        strength = head(source).weight.detach().abs().sum(0)
        chosen = strength.topk(min(self.neurons, len(strength))).indices
        before = trigger.get_buffer("pattern")
        pattern, best, least = before.to(images, copy=True), before, math.inf
        for number in range(self.steps + 1):
            pattern.requires_grad_()
            triggered = functional_call(trigger, {"pattern": pattern}, (images,))
            loss = (self.value - penultimate(source, triggered)[:, chosen]).square().mean()
            (slope,) = torch.autograd.grad(loss, pattern)
            pattern = pattern.detach()
            if loss.item() < least:
                best, least = pattern, loss.item()
            step = self.step * (1 - number / max(self.steps, 1))
            pattern = (pattern - step * slope.sign()).clamp(0, 1)
        before.copy_(best)
