"""What a recovered trigger is supposed to do: from which labels it flips images, and to which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdprune.record import TriggerKind


@dataclass(frozen=True)
class Hypothesis:
    """A kind of trigger, and the labels that it flips.

    Attributes:
        target: the label that all images are flipped to; None for any label but the true one.
        sources: the labels whose images are flipped; empty for all labels but the target.
        kind: ``patch``, ``additive`` or ``warp``.
        weighted: whether the trigger may specialise on the source whose images flip most easily: the sources have
            weights, and success is that of the weighted images.
    """

    target: int | None
    sources: tuple[int, ...] = ()
    kind: TriggerKind = "patch"
    weighted: bool = False

    def takes(self, labels: Tensor) -> Tensor:
        """Which images it is about, bool ``[N]``, from their labels ``[N]``."""
        if self.sources:
            taken = torch.isin(labels, torch.tensor(self.sources, device=labels.device))
        else:
            taken = torch.ones_like(labels, dtype=torch.bool)
        return taken if self.target is None else taken & (labels != self.target)


def every_target(num_classes: int, kind: TriggerKind = "patch") -> tuple[Hypothesis, ...]:
    """A hypothesis for each target label, and an untargeted one, which covers all-to-all backdoors."""
    return (*(Hypothesis(target, kind=kind) for target in range(num_classes)), Hypothesis(None, kind=kind))
