"""Universal and per-image triggers under an attack loss on margins of logits (DL-TND), and small universal changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.ops import stamp
from bdprune.runtime import FrozenNetworks

_FIRST_MASK = 0.5

Loss = Callable[[Tensor], Tensor]
"""Logits ``[H, N, K]`` -> the loss of every image ``[H, N]``, 0 or less where the attack succeeds."""


@dataclass(frozen=True)
class PerturbSettings:
    """Settings of :func:`smallest_triggers`.

    Attributes:
        rounds: number of values of the penalty that are tried.
        steps: steps of each round.
        warm: whether a round starts from the triggers of the last one; otherwise from the beginning.
        lr: learning rate of Adam, for masks and patterns.
        const: the first weight of the loss against the L1 norm of the mask.
        least_const: its lower limit. A step of Adam is at most ``lr`` and the penalty takes ``lr / const``, so that a
            weight below 1 erases every mask.
        most_const: its upper limit.
        success: share of the images on which a trigger must succeed.
        margin: a margin of logits beyond this one gains nothing (the paper's tau).
    """

    rounds: int = 4
    steps: int = 20
    warm: bool = True
    lr: float = 0.05
    const: float = 2.0
    least_const: float = 1.0
    most_const: float = 6.0
    success: float = 0.7
    margin: float = 15.0


@dataclass(frozen=True)
class ChangeSettings:
    """Settings of :func:`universal_change`.

    Attributes:
        bound: largest change of a value, for images in [0, 1].
        steps: steps of signed gradient descent; together they can cross the range 1.25 times.
        batch_size: images in one step.
    """

    bound: float = 4 / 255
    steps: int = 20
    batch_size: int = 64


@dataclass(frozen=True)
class Found:
    """The triggers of one round.

    Attributes:
        masks: ``[H, 1, h, w]`` in [0, 1].
        patterns: ``[H, C, h, w]`` in [0, 1].
        logits: ``[H, N, K]`` of the stamped images.
        successes: ``[H]``, the share of the images on which each trigger succeeds.
    """

    masks: Tensor
    patterns: Tensor
    logits: Tensor
    successes: Tensor

    @property
    def sizes(self) -> Tensor:
        """``[H]``, the L1 norms of the masks, in pixels."""
        return self.masks.flatten(1).sum(1)


def smallest_triggers(
    networks: FrozenNetworks,
    images: Tensor,
    picks: Tensor,
    loss: Loss,
    settings: PerturbSettings,
    generator: torch.Generator,
) -> Iterator[Found]:
    """The triggers of every round: ``min sum_i loss_i + ||m||_1 / const`` over masks and patterns in [0, 1].

    After a round, the weight ``const`` of each trigger is bisected: down after a success, up after a failure. A step is
    one of Adam on the loss, and then the proximal step of the penalty: every mask falls by ``lr / const``.

    Args:
        networks: one network.
        images: ``[M, C, h, w]`` in [0, 1].
        picks: ``[H, N]`` int64, the images of each trigger.
        generator: source of the first pattern, which is the same for all triggers, on the CPU.
    """
    masks = torch.full((len(picks), 1, *images.shape[2:]), _FIRST_MASK, device=networks.device)
    pattern = torch.rand(images.shape[1:], generator=generator).to(masks)
    first = (masks, pattern.expand(len(picks), *pattern.shape))
    lower, const, upper = (
        torch.full((len(picks), 1, 1, 1), value, device=masks.device)
        for value in (settings.least_const, settings.const, settings.most_const)
    )
    images, picks, trigger = images.to(masks), picks.to(masks.device), first
    for _ in range(settings.rounds):
        trigger = _descended(networks, images, picks, loss, trigger if settings.warm else first, const, settings)
        found = _measured(networks, images, picks, loss, trigger)
        yield found
        succeeded = (found.successes > settings.success).view_as(const).to(const.device)
        lower, upper = torch.where(succeeded, lower, const), torch.where(succeeded, const, upper)
        const = (lower + upper) / 2


def _descended(
    networks: FrozenNetworks,
    images: Tensor,
    picks: Tensor,
    loss: Loss,
    trigger: tuple[Tensor, Tensor],
    const: Tensor,
    settings: PerturbSettings,
) -> tuple[Tensor, Tensor]:
    """Masks and patterns after the steps of one round."""
    masks, patterns = (value.clone().requires_grad_(True) for value in trigger)
    optimizer = torch.optim.Adam([masks, patterns], lr=settings.lr)
    for _ in range(settings.steps):
        stamped = stamp(images, masks, patterns, picks)
        logits = networks.logits(stamped.flatten(0, 1)).unflatten(0, picks.shape)
        optimizer.zero_grad()
        loss(logits).clamp(min=-settings.margin).sum().backward()
        optimizer.step()
        with torch.no_grad():
            masks.sub_(settings.lr / const).clamp_(0, 1)
            patterns.clamp_(0, 1)
    return masks.detach(), patterns.detach()


@torch.no_grad()
def _measured(
    networks: FrozenNetworks, images: Tensor, picks: Tensor, loss: Loss, trigger: tuple[Tensor, Tensor]
) -> Found:
    stamped = stamp(images, *trigger, picks)
    logits = networks.logits(stamped.flatten(0, 1)).unflatten(0, picks.shape)
    successes = (loss(logits) <= 0).float().mean(1)
    return Found(trigger[0].cpu(), trigger[1].cpu(), logits.cpu(), successes.cpu())


def universal_change(
    module: nn.Module, images: Tensor, labels: Tensor, settings: ChangeSettings, seed: int = 0, away: bool = False
) -> Tensor:
    """One small change ``[1, C, h, w]`` of all images that leads them to their labels.

    Args:
        module: images -> logits; it runs in eval mode.
        images: ``[N, C, h, w]`` in [0, 1]; the changed images are clipped to this range.
        labels: ``[N]``, where the images shall go.
        settings: bound and steps.
        seed: of the draws of the images.
        away: lead them away from the labels instead.

    Source: Zhu et al., Breaking the False Sense of Security in Backdoor Defense through Re-Activation Attack, NeurIPS
    2024, where the images carry the trigger.
    """
    module.eval()
    generator = torch.Generator().manual_seed(seed)
    step = (1 if away else -1) * 2.5 * settings.bound / settings.steps
    change = images.new_zeros(1, *images.shape[1:])
    for _ in range(settings.steps):
        index = torch.randperm(len(images), generator=generator)[: settings.batch_size].to(images.device)
        change = change.detach().requires_grad_()
        loss = functional.cross_entropy(module((images[index] + change).clamp(0, 1)), labels[index])
        (slope,) = torch.autograd.grad(loss, change)
        change = (change + step * slope.sign()).clamp(-settings.bound, settings.bound)
    return change.detach()
