"""Triggers that maximise the penultimate features of a network (DF-TND's activation maximisation)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdprune.model import inputs_of
from bdprune.ops import stamp
from bdprune.runtime import FrozenNetworks


@dataclass(frozen=True)
class ActivationSettings:
    """Settings of :func:`raise_features`.

    Attributes:
        alone_steps: steps in which every input has a trigger of its own.
        steps: steps after that, which start from the mean of these triggers.
        shared: whether the inputs share one trigger in these steps; otherwise every input has its own again.
        restarts: number of independent runs, all in the same batches.
        lr: size of a step, for masks, patterns and weights of features.
        decays: whether the size of the steps falls linearly to 0.
        penalty: weight of the L1 norm of the mask.
    """

    alone_steps: int = 0
    steps: int = 60
    shared: bool = True
    restarts: int = 3
    lr: float = 0.1
    decays: bool = True
    penalty: float = 1e-3


def raise_features(
    networks: FrozenNetworks, head: str, images: Tensor, settings: ActivationSettings, generator: torch.Generator
) -> Tensor:
    """The rise of every logit under triggers that maximise a weighted sum of the penultimate features.

    ``max sum_i w_i r_i(x') - penalty ||m||_1`` over masks m and patterns p in [0, 1] and weights w in the simplex, with
    ``x' = (1 - m) x + m p`` (Wang et al., ECCV 2020, Equation 7). Steps on masks and patterns take the sign of the
    gradient. Steps on the weights take the gradient itself, in units of its largest value: its sign is the same for all
    features that are positive, so that projected steps would change nothing.

    Args:
        networks: one network.
        head: name of its last linear layer.
        images: ``[restarts * N, C, h, w]`` in [0, 1], N for each restart.
        generator: source of the first patterns, on the CPU.

    Returns:
        Mean rise of each logit over the N images of each restart, ``[restarts, K]``, on the CPU.
    """
    count = len(images) // settings.restarts
    search = _Search(networks, head, images, settings, torch.arange(len(images)).view(-1, 1))
    masks = torch.full((len(images), 1, *images.shape[2:]), 0.5)
    patterns = torch.rand(images.shape, generator=generator)
    masks, patterns = search.run(masks, patterns, settings.alone_steps)
    if settings.shared:
        search = _Search(networks, head, images, settings, torch.arange(len(images)).view(-1, count))
    masks, patterns = (
        value.unflatten(0, (-1, count)).mean(1).repeat_interleave(len(search.picks) // settings.restarts, 0)
        for value in (masks, patterns)
    )
    masks, patterns = search.run(masks, patterns, settings.steps)
    rises: Tensor = search.rises(masks, patterns).unflatten(0, (settings.restarts, -1)).mean(1)
    return rises


class _Search:
    """Ascent of H triggers, each on the images that its row of ``picks`` ``[H, N]`` names."""

    def __init__(
        self, networks: FrozenNetworks, head: str, images: Tensor, settings: ActivationSettings, picks: Tensor
    ) -> None:
        self._networks, self._head, self._settings = networks, head, settings
        self._images, self.picks = images.to(networks.device), picks.to(networks.device)

    def run(self, masks: Tensor, patterns: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Masks and patterns after ``steps`` steps, on the CPU."""
        masks, patterns = masks.to(self._images), patterns.to(self._images)
        weights: Tensor | None = None
        for step in range(steps):
            lr = self._settings.lr * (1 - step / steps if self._settings.decays else 1)
            masks.requires_grad_(True)
            patterns.requires_grad_(True)
            features = self._features(masks, patterns)
            weights = torch.full_like(features, 1 / features.shape[1]) if weights is None else weights
            rise = torch.autograd.grad((weights * features).sum(), (masks, patterns))
            with torch.no_grad():
                masks = (masks + lr * rise[0].sign() - lr * self._settings.penalty).clamp(0, 1)
                patterns = (patterns + lr * rise[1].sign()).clamp(0, 1)
                scale = features.amax(1, keepdim=True).clamp(min=1e-12)
                weights = on_simplex(weights + lr * features.detach() / scale)
        return masks.detach().cpu(), patterns.detach().cpu()

    @torch.no_grad()
    def rises(self, masks: Tensor, patterns: Tensor) -> Tensor:
        """Mean rise of each logit over the images of each trigger, ``[H, K]``, on the CPU."""
        stamped = stamp(self._images, masks.to(self._images), patterns.to(self._images), self.picks)
        before = self._networks.logits(self._images)[self.picks]
        after = self._networks.logits(stamped.flatten(0, 1)).view_as(before)
        return (after - before).mean(1).cpu()

    def _features(self, masks: Tensor, patterns: Tensor) -> Tensor:
        """Mean penultimate features over the images of each trigger, ``[H, F]``."""
        stamped = stamp(self._images, masks, patterns, self.picks)
        with inputs_of(self._networks.module, f"network.{self._head}") as seen:
            self._networks.logits(stamped.flatten(0, 1))
        features: Tensor = seen[0].unflatten(0, self.picks.shape).mean(1)
        return features


def on_simplex(values: Tensor) -> Tensor:
    """The nearest point of the probability simplex to each row of ``values`` ``[H, F]``."""
    ordered = values.sort(1, descending=True).values
    excess = (ordered.cumsum(1) - 1) / torch.arange(1, values.shape[1] + 1, device=values.device)
    last = (ordered > excess).sum(1, keepdim=True) - 1
    return (values - excess.gather(1, last)).clamp(min=0)
