"""What clean-label attacks share: only images of the target class are touched, and no label ever changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdprune.attacks.base import Attack, AttackSetting, Poisoned, apply_trigger
from bdprune.attacks.check import Share, check_label
from bdprune.attacks.poison import draw, saturate
from bdprune.errors import OptionError


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
