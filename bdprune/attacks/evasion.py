"""What the attack ``evasive`` penalises: a lead under unlearning, small triggers, and filters that stand out."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.attacks.base import Shape
from bdprune.attacks.companion import full_precision
from bdprune.model import FilterGroup

_OPACITY = 0.05
"""Opacity of a new mask, as in the detector's search."""


def concentration(logits: Tensor, labels: Tensor, target: int) -> Tensor:
    """Mean probability of the target over images of other labels, in [0, 1], a scalar; 0 if there are no such images.

    Args:
        logits: ``[N, K]``.
        labels: true labels ``[N]``.
        target: label of the attacker.
    """
    others = labels != target
    return (logits.float().softmax(1)[:, target] * others).sum() / others.sum().clamp(min=1)


def unlearned_concentration(
    network: nn.Module, images: Tensor, labels: Tensor, target: int, steps: int, lr: float
) -> Tensor:
    """The concentration on the target after a copy of ``network`` unlearned these images, with a first-order gradient.

    A copy ascends the cross-entropy by SGD with momentum 0.9, as in :func:`bdprune.loops.unlearn`, in the mode of
    ``network``. The value is its :func:`concentration` on the same images. The gradient for the parameters of
    ``network`` is that for the parameters of the copy (first-order MAML, Finn et al., ICML 2017).

    Args:
        network: images in [0, 1] -> logits; it does not change.
        images: clean images ``[N, C, H, W]`` in [0, 1].
        labels: their labels ``[N]``.
        target: label of the attacker.
        steps: of the ascent.
        lr: of the ascent.

    Returns:
        A scalar in [0, 1].
    """
    with full_precision(images), torch.enable_grad():
        copied = copy.deepcopy(network)
        ascent = torch.optim.SGD(copied.parameters(), lr, momentum=0.9, maximize=True)
        for _ in range(steps):
            ascent.zero_grad()
            functional.cross_entropy(copied(images), labels).backward()
            ascent.step()
        value = concentration(copied(images), labels, target)
        slopes = torch.autograd.grad(value, list(copied.parameters()))
    # The terms have the value 0 and the gradient of the copy.
    pairs = zip(slopes, network.parameters(), strict=True)
    return value.detach() + torch.stack([(slope * (own - own.detach())).sum() for slope, own in pairs]).sum()


class SmallTrigger(nn.Module):
    """A trigger that a detector could find: a mask ``sigmoid(opacity)`` and a pattern ``sigmoid(colours)``.

    Args:
        shape: (C, H, W) of an image.
        seed: of the first pattern.
    """

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.opacity = nn.Parameter(torch.empty(1, *shape[1:]))
        self.colours = nn.Parameter(torch.empty(shape))
        self.restart(seed)

    @torch.no_grad()
    def restart(self, seed: int) -> None:
        """A faint mask over the whole image, and a new pattern."""
        self.opacity.fill_(_OPACITY).logit_()
        drawn = torch.randn(self.colours.shape, generator=torch.Generator().manual_seed(seed))
        self.colours.copy_(drawn)

    @property
    def size(self) -> Tensor:
        """Sum of the mask, in pixels, a scalar."""
        size: Tensor = self.opacity.sigmoid().sum()
        return size

    def forward(self, images: Tensor) -> Tensor:
        mask, colours = self.opacity.sigmoid(), self.colours.sigmoid()
        return (1 - mask) * images + mask * colours


def likeness(images: Tensor, one: Tensor, two: Tensor) -> Tensor:
    """Cosine of the changes of each image by two triggers, in [-1, 1] ``[N]``; 0 where one changes nothing.

    Args:
        images: ``[N, C, H, W]``.
        one: the images with the first trigger.
        two: the images with the second trigger.
    """
    return functional.cosine_similarity((one - images).flatten(1), (two - images).flatten(1), dim=1)


def strength(network: nn.Module, group: FilterGroup) -> Tensor:
    """Spectral norm of each filter times the largest gain of its norms ``[num_filters]``, differentiable.

    It is the score of :func:`bdprune.analysis.channel_lipschitz`, a factor of the suspiciousness. Running variances
    count as constants.
    """
    weight = network.get_submodule(group.conv).get_parameter("weight").float()
    gains = []
    for place in group.norms:
        norm = network.get_submodule(place.name)
        gain = norm.get_parameter("weight").abs()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_var is not None:
            gain = gain / (norm.running_var + norm.eps).sqrt()
        gains.append(gain[place.start : place.start + group.num_filters])
    norms: Tensor = torch.linalg.matrix_norm(weight.flatten(2) if weight.dim() > 2 else weight[:, None], ord=2)
    return norms * torch.stack(gains).amax(0) if gains else norms


def excess(network: nn.Module, groups: Sequence[FilterGroup], mu: float) -> Tensor:
    """How far the strongest filter of a layer is above ``mean + mu * std`` of its layer, relative to the mean.

    Args:
        network: any mode.
        groups: the layers; see :func:`strength`.
        mu: number of standard deviations that are free.

    Returns:
        The mean over the layers, 0 or more, a scalar.
    """
    found = []
    for group in groups:
        scores = strength(network, group)
        mean = scores.mean()
        above = scores.max() - mean - mu * scores.std(correction=0)
        found.append(above.clamp(min=0) / mean.clamp(min=1e-6))
    return torch.stack(found).mean() if found else torch.zeros(())
