"""Feature collision (Shafahi et al., 2018): images of the target class with features of triggered images of another.

The published attack targets one chosen test image. RNP reports it as a backdoor from one source class to one target
class and does not describe its poison; here all poison collides with the centre of the source class's triggered
images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from bdprune.attacks.base import AttackSetting, CleanLabel, Shape, apply_trigger
from bdprune.attacks.check import Count, NotNegative, Share, Whole, check_label
from bdprune.attacks.features import penultimate, source_of
from bdprune.attacks.patterns import Stamp, checkerboard, in_corner
from bdprune.errors import OptionError


@dataclass(frozen=True)
class FeatureCollision(CleanLabel):
    """Poison is ``argmin ||phi(x) - c||^2 + beta ||x - b||^2`` with phi the penultimate features of a clean network.

    b is an image of the target class with a watermark (``opacity`` of an image of the source class) and the trigger
    over both at full strength, because a network trained from scratch does not learn a faint trigger. c is the mean
    feature of triggered images of the source class. Solved by forward-backward splitting: the step size of an image
    halves whenever its objective does not decrease, and every step clips to [0, 1]. At test time the trigger, a
    checkerboard in the bottom right corner, leads images of the source class to the target; it replaces pixels and
    needs no clipping.

    Args:
        target: target label.
        rate: share of the whole training set to poison, all of it from the target class (RNP, Table 6: 0.08).
        source_class: label of the images that the trigger works on (RNP: 1).
        size: edge of the square patch in pixels.
        margin: free pixels between the patch and the image border.
        opacity: of the watermark (the paper: 0.3 if the whole network is trained).
        beta: weight of staying close to b. Our choice for images in [0, 1] and batch-normalised networks: images move
            by about 8/255, and the distance to c nearly vanishes. (The paper's value is for another extractor.)
        step_size: the first step size.
        steps: of the splitting, each a pass forward and back.
    """

    source_class: Whole = 1
    size: Count = 6
    margin: Whole = 1
    opacity: Share = 0.3
    beta: NotNegative = 1.0
    step_size: NotNegative = 0.3
    steps: Whole = 20

    kind: ClassVar[str] = "feature-collision"
    needs_source: ClassVar[Literal["clean", "backdoored"] | None] = "clean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source_class == self.target:
            raise OptionError(f"Source class and target are both {self.target}.", "Give another source_class.")

    @property
    def sources(self) -> tuple[int, ...]:
        return (self.source_class,)

    def new_trigger(self, shape: Shape) -> nn.Module:
        mask = in_corner(torch.ones(1, self.size, self.size), self.margin, shape)
        patch = checkerboard(self.size).expand(shape[0], -1, -1)
        return Stamp(mask, in_corner(patch, self.margin, shape))

    def goal(self, labels: Tensor, num_classes: int) -> Tensor:
        """The target for images of the source class; for others their own label, so that they do not count."""
        check_label("source_class", self.source_class, num_classes)
        return torch.where(labels == self.source_class, super().goal(labels, num_classes), labels)

    def poison_images(
        self, images: Tensor, setting: AttackSetting, trigger: nn.Module, generator: torch.Generator
    ) -> Tensor:
        check_label("source_class", self.source_class, setting.num_classes)
        source = source_of(setting)
        others = (setting.labels == self.source_class).nonzero().flatten()
        if not len(others):
            raise OptionError(f"No image has the source class {self.source_class}.", "Give another source_class.")
        marks = others[torch.randint(len(others), (len(images),), generator=generator)]
        drawn = others[torch.randperm(len(others), generator=generator)[:500]]
        centre = _features(source, apply_trigger(trigger, setting.images[drawn])).mean(0)
        marked = (1 - self.opacity) * images + self.opacity * setting.images[marks].float() / 255
        bases = apply_trigger(trigger, marked)
        batches = [collide(source, batch, centre, self.beta, self.step_size, self.steps) for batch in bases.split(250)]
        return torch.cat(batches) if batches else images


def collide(source: nn.Module, bases: Tensor, centre: Tensor, beta: float, step_size: float, steps: int) -> Tensor:
    """Images ``[N, C, H, W]`` near ``bases`` with features near ``centre`` ``[F]``: forward-backward splitting.

    Args:
        source: network that gives the penultimate features; it does not change.
        bases: ``[N, C, H, W]`` in [0, 1].
        centre: ``[F]``, on the network's device.
        beta: weight of ``||x - b||^2``.
        step_size: the first step size; halves for an image whenever its objective does not decrease.
        steps: of the splitting, each a pass forward and back.
    """
    bases = bases.to(centre.device)
    x = bases
    value, slope = _objective(source, x, bases, centre, beta)
    rate = torch.full((len(x), 1, 1, 1), step_size, device=x.device)
    for _ in range(steps):
        forward = x - rate * slope
        tried = ((forward + rate * beta * bases) / (1 + rate * beta)).clamp(0, 1)
        tried_value, tried_slope = _objective(source, tried, bases, centre, beta)
        better = (tried_value < value).view(-1, 1, 1, 1)
        x, slope = torch.where(better, tried, x), torch.where(better, tried_slope, slope)
        value, rate = torch.minimum(value, tried_value), torch.where(better, rate, rate / 2)
    return x.cpu()


def _objective(source: nn.Module, x: Tensor, bases: Tensor, centre: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """``||phi(x) - c||^2 + beta ||x - b||^2``, ``[N]``, and half the gradient of its first term, ``[N, C, H, W]``."""
    x = x.detach().requires_grad_()
    apart = (penultimate(source, x) - centre).square().sum(1)
    (slope,) = torch.autograd.grad(apart.sum(), x)
    return apart.detach() + beta * (x.detach() - bases).square().flatten(1).sum(1), slope / 2


@torch.no_grad()
def _features(source: nn.Module, images: Tensor) -> Tensor:
    """Penultimate features of a few hundred images, ``[N, F]``, on the network's device."""
    return penultimate(source, images.to(next(source.parameters()).device))
