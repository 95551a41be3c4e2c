"""What inversion minimises for each hypothesis, and when an image counts as flipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bdprune.loops.inversion.hypotheses import Hypothesis
from bdprune.runtime import BATCH, FrozenNetworks

_AWAY = -1  # target of an untargeted hypothesis


def targets_of(hypotheses: Sequence[Hypothesis]) -> Tensor:
    """The target label of each hypothesis ``[H]``; -1 for an untargeted one."""
    return torch.tensor([_AWAY if one.target is None else one.target for one in hypotheses])


def flip_losses(logits: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """Loss of each image of each hypothesis ``[H, N]``.

    It is the cross-entropy with the target, ``-log p(target)``; for an untargeted hypothesis ``-log(1 - p(label))``.

    Args:
        logits: ``[H, N, K]``.
        targets: from :func:`targets_of`.
        labels: true labels ``[H, N]``.
    """
    total = logits.logsumexp(2)
    wanted = targets.clamp(min=0)[:, None, None].expand(*labels.shape, 1)
    at_target = logits.gather(2, wanted).squeeze(2)
    elsewhere = logits.scatter(2, labels.unsqueeze(2), -torch.inf).logsumexp(2)
    return total - torch.where(targets[:, None] == _AWAY, elsewhere, at_target)


def losses_by_target(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of each image with each label as the target, and in the last place with no target ``[N, K + 1]``.

    Args:
        logits: ``[N, K]``.
        labels: true labels ``[N]``.
    """
    total = logits.logsumexp(1, keepdim=True)
    elsewhere = logits.scatter(1, labels.unsqueeze(1), -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([total - logits, total - elsewhere], 1)


def flips(logits: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """Which images are flipped, bool ``[H, N]``: to the target, or away from their label; arguments as above."""
    predicted = logits.argmax(2)
    return torch.where(targets[:, None] == _AWAY, predicted != labels, predicted == targets[:, None])


@torch.no_grad()
def clean_logits(networks: FrozenNetworks, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of each of the G models for images ``[G, N, K]`` and their labels ``[N]``, in parts."""
    for part, own in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        repeated = part.repeat(networks.count, 1, 1, 1).contiguous(memory_format=networks.layout)
        yield networks.logits(repeated).unflatten(0, (networks.count, -1)), own


def labelled_right(networks: FrozenNetworks, images: Tensor, labels: Tensor, all_count: bool) -> Tensor:
    """Whether each of the G models labels each image correctly ``[G, N]``; True for all of them if ``all_count``."""
    if all_count or not len(labels):
        return torch.ones(networks.count, len(labels), dtype=torch.bool, device=labels.device)
    return torch.cat([logits.argmax(2) == own for logits, own in clean_logits(networks, images, labels)], 1)
