"""Label-consistent attack (Turner et al., 2019): adversarial images of the target class carry the trigger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.attacks.base import AttackSetting, CleanLabel, Shape, apply_trigger
from bdprune.attacks.check import Count, NotNegative, Share, Whole, check_fits
from bdprune.attacks.features import source_of
from bdprune.attacks.patterns import Stamp, checkerboard


@dataclass(frozen=True)
class LabelConsistent(CleanLabel):
    """PGD on a clean network makes images of the target class hard to classify, so that training relies on the stamp.

    The trigger is a black-and-white checkerboard in each of the four corners; it replaces pixels, so it needs no
    clipping. PGD ascends the cross-entropy from a random start and stays within ``epsilon`` (largest change of a
    pixel) and [0, 1].

    Args:
        target: target label.
        rate: share of the whole training set to poison, all of it from the target class (RNP, Table 6: 0.08).
        epsilon: largest change of a pixel, for values in [0, 1] (ANP: 16/255; BackdoorBench: 8/255).
        step: length of a PGD step.
        steps: PGD steps; ten of the default length cover 2.5 times ``epsilon``. (BackdoorBench: 100 of 1.5/255.)
        size: edge of each square patch in pixels (ANP: 3).
        margin: free pixels between the patches and the image border.
    """

    epsilon: Share = 16 / 255
    step: NotNegative = 4 / 255
    steps: Whole = 10
    size: Count = 3
    margin: Whole = 0

    kind: ClassVar[str] = "label-consistent"
    needs_source: ClassVar[Literal["clean", "backdoored"] | None] = "clean"

    def new_trigger(self, shape: Shape) -> nn.Module:
        check_fits(2 * (self.size + self.margin), shape)
        mask, pattern = torch.zeros(1, *shape[1:]), torch.zeros(shape)
        near = slice(self.margin, self.margin + self.size)
        for rows in (near, _mirrored(near, shape[1])):
            for columns in (near, _mirrored(near, shape[2])):
                mask[:, rows, columns] = 1
                pattern[:, rows, columns] = checkerboard(self.size)
        return Stamp(mask, pattern)

    def poison_images(
        self, images: Tensor, setting: AttackSetting, trigger: nn.Module, generator: torch.Generator
    ) -> Tensor:
        assert self.target is not None
        return apply_trigger(trigger, self._hardened(source_of(setting), images, self.target, generator))

    def _hardened(self, source: nn.Module, images: Tensor, label: int, generator: torch.Generator) -> Tensor:
        """Images ``[N, C, H, W]`` near the given ones that ``source`` no longer classifies as ``label``."""
        device = next(source.parameters()).device
        start = images + self.epsilon * (2 * torch.rand(images.shape, generator=generator) - 1)
        done = []
        for clean, x in zip(images.split(250), start.clamp(0, 1).split(250), strict=True):
            clean, x = clean.to(device), x.to(device)
            wanted = torch.full((len(x),), label, device=device)
            for _ in range(self.steps):
                x.requires_grad_()
                (slope,) = torch.autograd.grad(functional.cross_entropy(source(x), wanted, reduction="sum"), x)
                x = x.detach() + self.step * slope.sign()
                x = torch.clamp(x, clean - self.epsilon, clean + self.epsilon).clamp(0, 1)
            done.append(x.cpu())
        return torch.cat(done) if done else images


def _mirrored(span: slice, length: int) -> slice:
    """The span at the same distance from the other end of ``length``."""
    return slice(length - span.stop, length - span.start)
