"""Adversarial neuron perturbation (Wu and Wang, NeurIPS 2021): masks that keep a network right under noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from bdprune.data import CleanData
from bdprune.errors import ArchitectureError, TrainingError
from bdprune.loops.recovery import NO_FILTERS, RETRAIN, Recovered
from bdprune.model import MaskedNetwork, Model
from bdprune.record import check_settings, check_shares
from bdprune.runtime import DEFAULT, Plan, Precision, crop_and_flip, keep_running_statistics, plan_for, seeded


@dataclass(frozen=True)
class AdversarialMaskSettings:
    """How to learn the masks.

    Args:
        iterations: updates of the masks.
        batch_size: images of one update, drawn with replacement; never more than there are images.
        lr: learning rate of the masks.
        momentum: SGD momentum.
        eps: size of the noise, relative to scale and shift of a filter; it starts uniform in [-eps, eps].
        attack_steps: steps of the noise up the loss, each of the size eps / attack_steps in every filter.
        alpha: weight of the loss without noise, in [0, 1]; the loss under noise has the weight 1 - alpha.
        project: limit the noise to [-eps, eps]. The published method does not: after its random start, noise can reach
            twice eps.
        padding: pixels of the random crop; half of the images are also mirrored.
        averaged: share of the last updates whose masks are averaged, in [0, 1]; at 0 the masks are those of the last
            update. Many masks end at 0, and their mean says which stayed there.
        small_data: below this number of images, batch norms use their running statistics and do not update them.

    Raises:
        OptionError: a setting is out of range.
    """

    iterations: int = 2000
    batch_size: int = 128
    lr: float = 0.2
    momentum: float = 0.9
    eps: float = 0.4
    attack_steps: int = 1
    alpha: float = 0.2
    project: bool = False
    padding: int = 4
    averaged: float = 0.0
    small_data: int = 64

    def __post_init__(self) -> None:
        least = {"iterations": 1, "batch_size": 1, "momentum": 0, "eps": 0, "attack_steps": 1, "padding": 0}
        check_settings(self, least, above={"lr": 0})
        check_shares(self, ["alpha", "averaged"])


def learn_masks(
    model: Model,
    data: CleanData,
    settings: AdversarialMaskSettings,
    seed: int = 0,
    precision: Precision = DEFAULT,
) -> Recovered:
    """Masks m in [0, 1] that minimise ``alpha CE(m) + (1 - alpha) max CE(m + d, 1 + x)`` on clean images.

    The noise d is added to the masks of the filters' scales, and 1 + x multiplies their shifts. A filter that can be
    perturbed so that clean images are misclassified gets a low mask, and backdoors make filters such. A filter without
    a norm of its own has the mask on its conv's output, and the noise x on its conv's bias.

    Args:
        precision: see :func:`bdprune.runtime.plan_for`.

    Returns:
        The masks ``[num_filters]`` of each group, and the loss of every update.

    Raises:
        BdpruneError: the network has no conv, the precision is unknown, or a loss is not finite.
    """
    noisy = NoisyMasks(model)
    if len(data) < settings.small_data:
        keep_running_statistics(noisy)
    plan = plan_for(precision, noisy, data.images)
    plan.arrange(noisy.masked.network)
    optimizer = torch.optim.SGD(noisy.masked.masks.values(), settings.lr, settings.momentum)
    generator = torch.Generator().manual_seed(seed)
    mean = _Mean(settings)
    losses: list[Tensor] = []
    with seeded(seed):
        for images, labels in _batches(data, settings, generator, model.device):
            noisy.start(settings.eps, generator)
            for _ in range(settings.attack_steps):
                _ascend(noisy, plan, images, labels, settings)
            worst = cross_entropy(plan.logits(noisy, images), labels)
            plain = cross_entropy(plan.logits(noisy.masked, images), labels)
            loss = settings.alpha * plain + (1 - settings.alpha) * worst
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            noisy.masked.clamp_()
            mean.add(noisy.masked.masks, len(losses))
            losses.append(loss.detach())
    found = torch.stack(losses).cpu()
    broken = (~found.isfinite()).nonzero()
    if len(broken):
        raise TrainingError(f"The loss of the masks is not finite in step {int(broken[0]) + 1}.", "Lower eps or lr.")
    return Recovered(mean.masks, tuple(found.tolist()), plan)


class _Mean:
    """The mean of the masks of the last updates."""

    def __init__(self, settings: AdversarialMaskSettings) -> None:
        self._first = settings.iterations - max(round(settings.averaged * settings.iterations), 1)
        self._count, self._sums = settings.iterations - self._first, dict[str, Tensor]()

    def add(self, masks: Mapping[str, Tensor], update: int) -> None:
        """Adds the masks after an update, counted from 0, if it is one of the last."""
        if update >= self._first:
            for name, mask in masks.items():
                self._sums[name] = self._sums.get(name, 0) + mask.detach()

    @property
    def masks(self) -> dict[str, Tensor]:
        """The means ``[num_filters]``, on the CPU."""
        return {name: (total / self._count).cpu() for name, total in self._sums.items()}


class NoisyMasks(nn.Module):
    """A network with masks, and noise on masks and shifts: images ``[N, C, H, W]`` -> logits ``[N, K]``.

    ``masked`` is the same network without noise. In train mode when it is made.

    Raises:
        ArchitectureError: the network has no conv.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        if not model.groups:
            raise ArchitectureError(NO_FILTERS, RETRAIN)
        self.masked = MaskedNetwork(model).train()
        places = dict(self.masked.named_parameters())
        biases = {f"network.network.{group.norm.name if group.norm else group.conv}.bias" for group in model.groups}
        names = [name for name in places if name.startswith("mask_list.") or name in biases]
        self._values = {name: places[name] for name in names}
        self.noise: dict[str, Tensor] = {}

    def start(self, eps: float, generator: torch.Generator) -> None:
        """Draws noise uniform in [-eps, eps], on the CPU so that every device gets the same."""
        self.noise = {
            name: ((2 * torch.rand(value.shape, generator=generator) - 1) * eps).to(value.device)
            for name, value in self._values.items()
        }

    def forward(self, images: Tensor) -> Tensor:
        changed = {
            name: value + self.noise[name] if name.startswith("mask_list.") else value * (1 + self.noise[name])
            for name, value in self._values.items()
            if name in self.noise
        }
        return functional_call(self.masked, changed, (images,))  # type: ignore[no-any-return]


def _ascend(noisy: NoisyMasks, plan: Plan, images: Tensor, labels: Tensor, settings: AdversarialMaskSettings) -> None:
    """Moves the noise one step up the loss."""
    names, values = list(noisy.noise), [value.requires_grad_() for value in noisy.noise.values()]
    # Not autograd.grad: PyTorch crashes if a channels-last group norm has a gradient for its scale only.
    cross_entropy(plan.logits(noisy, images), labels).backward()
    size = settings.eps / settings.attack_steps
    with torch.no_grad():
        moved = [value if value.grad is None else value + size * value.grad.sign() for value in values]
    if settings.project:
        moved = [value.clamp(-settings.eps, settings.eps) for value in moved]
    noisy.noise = dict(zip(names, moved, strict=True))


def _batches(
    data: CleanData, settings: AdversarialMaskSettings, generator: torch.Generator, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented images ``[B, C, H, W]`` and labels ``[B]``, one batch for every update."""
    size = min(settings.batch_size, len(data))
    for _ in range(settings.iterations):
        index = torch.randint(len(data), (size,), generator=generator)
        images = crop_and_flip(data.images[index], generator, settings.padding, data.mirror)
        yield images.to(device, non_blocking=True), data.labels[index].to(device, non_blocking=True)
