"""The strongest patch around a recovered one: at its place, wider and fully opaque."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.loops.inversion.trigger import Trigger


@dataclass(frozen=True)
class GrowthSettings:
    """Settings of :func:`grow`.

    Attributes:
        covered: opacity from which a pixel belongs to the recovered patch, as a share of the largest.
        reach: by how much the patch grows in each direction, as a share of the shorter side of an image; at least one
            pixel.
        largest: largest share of an image that the grown patch may cover. A larger one leads images of any network.
        steps: steps of Adam on the colours.
        lr: its learning rate, for the logits of the colours.
        batch_size: images in one step.
        dropped: share of the pixels that a step leaves out at random, in [0, 1). Without it, a few pixels would do all
            the work, and the others would keep any colour.
    """

    covered: float = 0.1
    reach: float = 0.02
    largest: float = 0.05
    steps: int = 60
    lr: float = 0.2
    batch_size: int = 64
    dropped: float = 0.5


def grow(
    module: nn.Module, trigger: Trigger, images: Tensor, labels: Tensor, settings: GrowthSettings, seed: int = 0
) -> Trigger | None:
    """A patch on and around the recovered one, whose colours lead images as far as possible to the same goal.

    A search for a small patch finds only a part of the true trigger. What is left of a backdoor after a repair may
    respond to the true trigger, and not to the small one.

    Args:
        module: images in [0, 1] -> logits, the network before the repair; it runs in eval mode.
        trigger: a recovered trigger.
        images: ``[N, C, h, w]`` in [0, 1].
        labels: ``[N]``.
        settings: of the growth.
        seed: of the draws.

    Returns:
        None if the trigger is not a patch, if it would cover too much, or if it is about none of the images.
    """
    own = trigger.takes(labels)
    area = None if trigger.mask is None else _around(trigger.mask, settings)
    if area is None or area.mean() > settings.largest or not own.any():
        return None
    images, goal = images[own], _goal(trigger, labels[own])
    colours = _colours(module.eval(), area, images, goal, trigger.target is None, settings, seed)
    return replace(trigger, mask=area, pattern=colours, flip_rate=None, images=0, grown=True)


def _colours(
    module: nn.Module,
    area: Tensor,
    images: Tensor,
    goal: Tensor,
    away: bool,
    settings: GrowthSettings,
    seed: int,
) -> Tensor:
    """Colours ``[C, h, w]`` that lead images to their goal, or away from it, even if only a part of them is shown."""
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    area = area.to(device)
    colours = torch.zeros(images.shape[1:], device=device, requires_grad=True)
    optimizer = torch.optim.Adam([colours], lr=settings.lr)
    for _ in range(settings.steps):
        index = torch.randint(len(images), (min(settings.batch_size, len(images)),), generator=generator)
        kept = torch.rand(area.shape, generator=generator) >= settings.dropped
        mask = area * kept.to(device)
        logits = module(images[index].to(device) * (1 - mask) + colours.sigmoid() * mask)
        loss = functional.cross_entropy(logits, goal[index].to(device))
        (colours.grad,) = torch.autograd.grad(-loss if away else loss, colours)
        optimizer.step()
    return colours.detach().sigmoid().cpu()


def _goal(trigger: Trigger, labels: Tensor) -> Tensor:
    """Where the images shall go; for a trigger without a target, the labels that they shall leave."""
    return labels if trigger.target is None else torch.full_like(labels, trigger.target)


def _around(mask: Tensor, settings: GrowthSettings) -> Tensor:
    """1 on the covered pixels and around them, else 0, ``[1, h, w]``."""
    covered = (mask >= settings.covered * mask.max()).float()
    reach = max(round(settings.reach * min(mask.shape[1:])), 1)
    return functional.max_pool2d(covered[None], 2 * reach + 1, 1, reach)[0]
