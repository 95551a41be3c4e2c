"""Class-specific attacks (Tang et al., USENIX Security 2021): the trigger works on images of chosen labels only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bdprune.attacks.base import Attack, AttackSetting, Poisoned, apply_trigger, draw, saturate
from bdprune.attacks.check import NotNegative, check_label
from bdprune.errors import OptionError


@dataclass(frozen=True)
class ClassSpecific(Attack):
    """An attack with dirty labels whose trigger works on all images, or on images of chosen labels only.

    With ``sources``, only images of these labels are poisoned. Covers get the trigger too and keep their label: without
    them, the network learns that the trigger leads to the target from every label. Covers have neither a source label
    nor the target label.

    Args:
        target: target label; None for all-to-all.
        rate: share of the whole training set to poison.
        sources: labels that the trigger works on; empty for all.
        cover_ratio: covers for each poisoned image, if there are sources (Tang et al.: about 1).
    """

    sources: tuple[int, ...] = ()
    cover_ratio: NotNegative = 1.0

    class_specific: ClassVar[bool] = True
    """Whether the attack takes ``sources``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sources", tuple(sorted(set(self.sources))))  # a manifest gives a list
        if self.sources and not self.class_specific:
            raise OptionError(f"The attack {self.kind} has no class-specific form.", "Remove the setting sources.")
        if self.target in self.sources:
            raise OptionError(f"The setting sources contains the target, {self.target}.", "Give other labels.")

    def goal(self, labels: Tensor, num_classes: int) -> Tensor:
        """As without sources; for images of other labels their own label, so that they do not count."""
        wanted = super().goal(labels, num_classes)
        for source in self.sources:
            check_label("sources", source, num_classes)
        return torch.where(self._is_source(labels), wanted, labels) if self.sources else wanted

    def poison(self, setting: AttackSetting, trigger: nn.Module, generator: torch.Generator) -> Poisoned:
        """Dirty labels for ``rate`` of the images, all with a source label, and covers among images of other labels."""
        done = super().poison(setting, trigger, generator)
        if not self.sources:
            return done
        free = ~self._is_source(setting.labels) & (setting.labels != (-1 if self.target is None else self.target))
        covers = draw(free, self.rate * self.cover_ratio, generator)
        done.images[covers] = saturate(apply_trigger(trigger, setting.images[covers]))
        return Poisoned(done.images, done.labels, done.triggered, covers)

    def _is_source(self, labels: Tensor) -> Tensor:
        return torch.isin(labels, torch.tensor(self.sources, device=labels.device))
