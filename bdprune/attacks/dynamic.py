"""Dynamic, or input-aware (Nguyen and Tran, NeurIPS 2020): every image gets its own pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.attacks.base import AttackSetting, Shape, TriggerType
from bdprune.attacks.check import Count, NotNegative, Share
from bdprune.attacks.companion import Companion, InBatch, TriggerObjective, full_precision, quota
from bdprune.attacks.generators import EncoderDecoder
from bdprune.errors import OptionError


@dataclass(frozen=True)
class Dynamic(InBatch):
    """``x' = x + (G(x) - x) M(x)``: a pattern G and a mask M, both trained along with the network; dirty labels.

    The training set stays clean. In every batch, a share of the images carries its own pattern and the attacker's
    label. Another share carries the pattern of another image and its true label, so that a pattern works only on its
    own image. First the mask is trained alone, while the network learns the clean task; then the mask is frozen, and
    the pattern is trained with the network's loss. The result is in [0, 1] because x and G(x) are; nothing is clipped.

    Defaults are the authors', except for the generators' sizes (ours, small for CPUs) and the learning rate, which
    falls linearly to zero instead of in steps.

    Args:
        target: target label; None for all-to-all.
        rate: share of each batch that is triggered and relabelled.
        cross_rate: share of each batch that carries the pattern of another image and keeps its label.
        mask_share: share of the schedule in which the mask is trained (the authors: 25 epochs before 600 others;
            short schedules need a larger share).
        density: largest mean of the mask without a penalty.
        density_weight: factor on the mean of the mask beyond ``density``.
        diversity_weight: factor on ``||x1 - x2|| / ||G(x1) - G(x2)||``, and on the same term for M.
        lr: Adam's learning rate of pattern and mask.
        width: channels of both generators at full resolution.
    """

    cross_rate: Share = 0.1
    mask_share: Share = 0.1
    density: float = 0.032
    density_weight: float = 100.0
    diversity_weight: float = 1.0
    lr: NotNegative = 0.01
    width: Count = 16

    kind: ClassVar[str] = "dynamic"
    trigger_type: ClassVar[TriggerType] = "input-dependent"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rate + self.cross_rate <= 1:
            hint = "Their sum must be 1 or less."
            raise OptionError(f"The settings rate and cross_rate are {self.rate} and {self.cross_rate}.", hint)

    def new_trigger(self, shape: Shape) -> InputAware:
        return InputAware(shape[0], self.width)

    def objective(self, setting: AttackSetting, trigger: nn.Module) -> InputAwareObjective:
        assert isinstance(trigger, InputAware)
        return InputAwareObjective(self, trigger.to(setting.device), setting.num_classes)


class InputAware(nn.Module):
    """Mixes a pattern G(x) in [0, 1] into the image by a mask M(x) in [0, 1], the same for all channels."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.pattern = EncoderDecoder(channels, channels, widths)
        self.mask = EncoderDecoder(channels, 1, widths)

    def patterns(self, images: Tensor) -> Tensor:
        """G(x): ``[N, C, H, W]`` in [0, 1]."""
        return self.pattern(images).tanh() / 2 + 0.5  # type: ignore[no-any-return]

    def masks(self, images: Tensor) -> Tensor:
        """M(x): ``[N, 1, H, W]`` in [0, 1], pushed towards 0 and 1."""
        soft = self.mask(images).tanh() / 2 + 0.5
        return (20 * soft - 10).tanh() / 2 + 0.5  # type: ignore[no-any-return]

    def mix(self, images: Tensor, patterns: Tensor, masks: Tensor) -> Tensor:
        """The images mixed with these patterns by these masks."""
        return images + (patterns - images) * masks

    def forward(self, images: Tensor) -> Tensor:
        return self.mix(images, self.patterns(images), self.masks(images))


class InputAwareObjective(TriggerObjective):
    """First the mask's own losses; then cross-entropy on attacked, crossed and clean images, and diversity."""

    def __init__(self, attack: Dynamic, trigger: InputAware, num_classes: int) -> None:
        self.attack, self.trigger, self.num_classes = attack, trigger, num_classes
        self._mask = Companion(trigger.mask, attack.lr, (0.5, 0.9))
        self._pattern = Companion(trigger.pattern, attack.lr, (0.5, 0.9))
        self._pattern.follow()
        super().__init__(trigger=trigger, mask=self._mask, pattern=self._pattern)

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor, done: float) -> Tensor:
        if done < self.attack.mask_share:
            with full_precision(images):
                self._mask.descend(self.mask_loss(images))
            return functional.cross_entropy(network(images).float(), labels)
        self._pattern.pace((1 - done) / (1 - self.attack.mask_share))
        with full_precision(images):
            batch, wanted, diversity = self.attacked(images, labels)
        self._steps += 1
        return functional.cross_entropy(network(batch).float(), wanted) + self.attack.diversity_weight * diversity

    def mask_loss(self, images: Tensor) -> Tensor:
        """Density and diversity of the masks of a batch, each image compared with its neighbour."""
        masks = self.trigger.masks(images)
        excess = (masks - self.attack.density).relu().mean()
        diversity = spread(images, images.roll(1, 0), masks, masks.roll(1, 0))
        return self.attack.density_weight * excess + self.attack.diversity_weight * diversity

    def attacked(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The batch with its attacked images first, then its crossed ones; its labels; the diversity of patterns."""
        wanted = self.attack.goal(labels, self.num_classes)
        shares = self.attack.rate, self.attack.cross_rate
        count, crossed = (quota(self._steps, share, len(images)) for share in shares)
        order = torch.argsort((wanted == labels).int(), stable=True)  # images that can be attacked come first
        images, labels, wanted = images[order], labels[order], wanted[order]
        if not count + crossed:
            return images, labels, images.new_zeros(())
        own, others = images[:count], images.roll(-crossed, 0)[count : count + crossed]
        with torch.no_grad():
            masks = self.trigger.masks(torch.cat([own, others]))
        patterns = self.trigger.patterns(torch.cat([own, others]))
        carriers = images[: count + crossed]
        batch = torch.cat([self.trigger.mix(carriers, patterns, masks), images[count + crossed :]])
        pairs = min(count, crossed)
        wanted = torch.cat([wanted[:count], labels[count:]])
        if not pairs:
            return batch, wanted, images.new_zeros(())
        return batch, wanted, spread(own[:pairs], others[:pairs], patterns[:pairs], patterns[count : count + pairs])


def spread(one: Tensor, two: Tensor, made_of_one: Tensor, made_of_two: Tensor) -> Tensor:
    """Mean of ``||one - two|| / ||made_of_one - made_of_two||`` over pairs, both as root mean squares: a scalar.

    It falls if different images get different patterns.
    """
    made = (made_of_one - made_of_two).square().flatten(1).mean(1)
    given = (one - two).square().flatten(1).mean(1)
    # The constant keeps the gradient finite if two patterns are equal.
    return (given.sqrt() / (made + 1e-8).sqrt()).mean()
