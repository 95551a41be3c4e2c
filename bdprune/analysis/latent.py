"""Latent margins: how far the features of clean images must move until the head names a label for all of them.

Our own derivation from the idea of reconstructing the change of activations by a quadratic program (arXiv 2511.08944).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdprune.analysis.case import Analysis, Case
from bdprune.model import Head, find_head, inputs_of

_BATCH_PIXELS = 1 << 19  # of all images in one forward pass
_SCALE_FLOOR = 0.05  # of the mean standard deviation: a feature that never varies would cost nothing
_ORDERING, _ROUGH = 100, 10  # images and steps that suffice to order the labels
_TOGETHER = 20  # of these images in one forward pass
_CLOSE = 1e-4  # of a constraint's right side: the solution is good enough


@dataclass(frozen=True)
class Latent:
    """The head of a network, and its features and logits on images.

    Attributes:
        head: the last linear layer.
        features: ``[N, F]``, on the CPU.
        logits: ``[N, K]``, on the CPU.
    """

    head: Head
    features: Tensor
    logits: Tensor


@dataclass(frozen=True)
class LatentFeatures(Analysis[Latent | None]):
    """Penultimate features of the clean images; None if the network does not end in a linear layer."""

    def compute(self, case: Case) -> Latent | None:
        model, images = case.model, case.images.images
        head = find_head(model)
        if head is None:
            return None
        batch = max(1, _BATCH_PIXELS // (images.shape[2] * images.shape[3]))
        with torch.no_grad(), inputs_of(model.network, head.path) as seen:
            logits = [model.module(part.to(model.device)).float().cpu() for part in images.split(batch)]
        return Latent(head, torch.cat([one.float().cpu() for one in seen]), torch.cat(logits))


@dataclass(frozen=True)
class LatentMargins(Analysis[Tensor | None]):
    """:func:`latent_margins` of the clean images, ``[K]``; None if the network does not end in a linear layer.

    Args:
        quantile: as in :func:`latent_margins`.
        scaled: as in :func:`latent_margins`.
        steps: as in :func:`latent_margins`.
    """

    quantile: float = 0.99
    scaled: bool = True
    steps: int = 300

    def compute(self, case: Case) -> Tensor | None:
        latent = case.get(LatentFeatures())
        return None if latent is None else latent_margins(latent, self.quantile, self.scaled, self.steps)


def latent_margins(latent: Latent, quantile: float, scaled: bool, steps: int) -> Tensor:
    """Norm of the smallest shift s of the features that leads to each label t, ``[K]``.

    ``min |s| subject to (w_t - w_j) s >= d_j for all j != t``, where ``d_j`` is a quantile, over the images that are
    not predicted as t, of how far logit j is above logit t. The N (K - 1) constraints of all images collapse to K - 1.
    The dual is a non-negative least-squares problem; it is solved for all labels at once by steps on the coordinate
    that gains most.

    Args:
        quantile: share of the images that the shift must move to t, by each of its constraints; in (0, 1].
        scaled: measure the shift of each feature in inverse units of its standard deviation, so that features that are
            quiet on clean images, as those of a backdoor, cost little. Ignored if a feature is the same for all images:
            its scale is unknown, and the floor for it would decide.
        steps: maximum number of steps.

    Returns:
        NaN for a label that is predicted for all images.
    """
    weight, needed = latent.head.weight.double(), _needed(latent.logits.double(), quantile)
    spread = latent.features.double().std(0, correction=0)
    if scaled and bool((spread > 0).all()):
        weight = weight / (spread + _SCALE_FLOOR * spread.mean()).clamp(min=1e-12)
    distance = torch.cdist(weight, weight).square()
    distance.fill_diagonal_(torch.inf)
    distance.clamp_(min=1e-12)  # two labels may have equal rows
    shifts, duals = torch.zeros_like(weight), torch.zeros_like(needed)
    for _ in range(steps):
        own = (weight * shifts).sum(1, keepdim=True)
        change = torch.maximum((needed - own + shifts @ weight.T) / distance, -duals)
        gains, best = (change.abs() * distance.sqrt()).nan_to_num(0).max(1, keepdim=True)
        if bool((gains <= _CLOSE * shifts.norm(dim=1, keepdim=True)).all()):
            break
        step = change.gather(1, best)
        duals.scatter_add_(1, best, step)
        shifts += step * (weight - weight[best.squeeze(1)])
    return torch.where(needed.isneginf().all(1), torch.nan, shifts.norm(dim=1)).float()


def _needed(logits: Tensor, quantile: float) -> Tensor:
    """``[K, K]``: the right side d of constraint j of label t; minus infinity where there is none."""
    predicted = logits.argmax(1)
    needed = logits.new_full((logits.shape[1],) * 2, -torch.inf)
    for label in range(logits.shape[1]):
        others = logits[predicted != label]
        if len(others):
            needed[label] = _quantile(others - others[:, [label]], quantile)
        needed[label, label] = -torch.inf
    return needed


def _quantile(values: Tensor, quantile: float) -> Tensor:
    """``values.quantile(quantile, 0)``; for a high quantile it need not sort all values."""
    place = quantile * (len(values) - 1)
    low = int(place)
    top = values.topk(len(values) - low, 0).values
    return torch.lerp(top[-1], top[-2], place - low) if len(top) > 1 else top[-1]


@dataclass(frozen=True)
class LabelOrder(Analysis[Tensor]):
    """All labels ``[K]``, those first that the features of a few images reach most easily.

    They come in the order of rough latent margins; for a network without a head, of their mean logits.
    """

    def compute(self, case: Case) -> Tensor:
        few = case.with_data(case.images.spread(_ORDERING))
        latent = few.get(LatentFeatures())
        ease: Tensor
        if latent is None:
            with torch.no_grad():
                parts = [case.model.module(part.to(case.model.device)) for part in few.images.images.split(_TOGETHER)]
            ease = -torch.cat(parts).mean(0).cpu()
        else:
            ease = latent_margins(latent, 1.0, LatentMargins.scaled, _ROUGH)
        return ease.nan_to_num(torch.inf).sort(stable=True).indices


def promising_labels(case: Case, count: int) -> Tensor:
    """``count`` labels that are worth a costly search, the easiest to reach first; all, in their own order, if there
    are not more.
    """
    classes = case.model.num_classes
    return torch.arange(classes) if count >= classes else case.get(LabelOrder())[:count]
