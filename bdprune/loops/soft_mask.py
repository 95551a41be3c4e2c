"""Adversarial weight masking (Chai and Chen, NeurIPS 2022): a factor in [0, 1] for every weight of the convs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from bdprune.data import CleanData
from bdprune.errors import ArchitectureError, TrainingError
from bdprune.loops.recovery import RETRAIN
from bdprune.model import Model
from bdprune.record import check_settings, check_shares
from bdprune.runtime import DEFAULT, Plan, Precision, passes, plan_for

_VALUES = 3 * 32 * 32  # of an image for which the paper gives its radius


@dataclass(frozen=True)
class SoftMaskSettings:
    """How to learn the masks.

    Args:
        epochs: times that the perturbation starts anew.
        passes: passes over the images in each epoch, for the perturbation and then for the masks.
        batch_size: images of one step.
        lr: learning rate of the masks, by Adam.
        alpha: weight of the loss without perturbation, in [0, 1]; the loss under it has the weight 1 - alpha.
        sparsity: weight of the L1 norm of all masks.
        radius: largest L1 norm of the perturbation of an image of 3x32x32 in [0, 1]; in proportion for other sizes.
        attack_lr: learning rate of the perturbation, by plain gradient ascent.
        copies: copies of every image in a pass, each augmented anew.
        padding: pixels of the random crop; half of the images are also mirrored.

    Raises:
        OptionError: a setting is out of range.
    """

    epochs: int = 20
    passes: int = 5
    batch_size: int = 128
    lr: float = 0.01
    alpha: float = 0.9
    sparsity: float = 1e-8
    radius: float = 1000.0
    attack_lr: float = 10.0
    copies: int = 1
    padding: int = 4

    def __post_init__(self) -> None:
        least = {"epochs": 1, "passes": 1, "batch_size": 1, "copies": 1, "padding": 0, "sparsity": 0, "radius": 0}
        check_settings(self, least, above={"lr": 0, "attack_lr": 0})
        check_shares(self, ["alpha"])


class SoftMasks(nn.Module):
    """A network in eval mode with a mask for every weight of its convs: images ``[N, C, H, W]`` -> logits ``[N, K]``.

    Only the masks require a gradient; ``model`` does not change.

    Raises:
        ArchitectureError: no conv has a weight of its own.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._model = model
        self.module = model.clone().module.eval().requires_grad_(False)
        parameters = dict(self.module.named_parameters())
        names = [f"network.{group.conv}.weight" for group in model.groups]
        self._weights = {name: parameters[name] for name in names if name in parameters}
        if not self._weights:
            raise ArchitectureError("The network has no conv whose weights can be masked.", RETRAIN)
        self.masks = nn.ParameterList([nn.Parameter(torch.ones_like(value)) for value in self._weights.values()])

    def forward(self, images: Tensor) -> Tensor:
        masked = {name: value * mask for (name, value), mask in zip(self._weights.items(), self.masks, strict=True)}
        return functional_call(self.module, masked, (images,))  # type: ignore[no-any-return]

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clips every mask to [0, 1]."""
        for mask in self.masks:
            mask.clamp_(0, 1)

    @torch.no_grad()
    def model(self, strength: float = 1.0) -> Model:
        """A copy of the model with the factors ``1 - strength (1 - mask)`` multiplied into its weights.

        Args:
            strength: in [0, 1]; 1 for the masks themselves.
        """
        found = self._model.clone()
        own = dict(found.module.named_parameters())
        for name, mask in zip(self._weights, self.masks, strict=True):
            own[name].mul_(1 - strength * (1 - mask))
        return found

    @property
    def share(self) -> float:
        """Mean of all masks, in [0, 1]."""
        return float(sum(mask.detach().sum() for mask in self.masks) / sum(mask.numel() for mask in self.masks))


def soft_masks(
    model: Model, data: CleanData, settings: SoftMaskSettings, seed: int = 0, precision: Precision = DEFAULT
) -> SoftMasks:
    """The network with masks after the last epoch.

    The masks minimise ``alpha CE(x) + (1 - alpha) CE(x + d) + sparsity ||m||_1`` in eval mode. Before, d, one
    perturbation for all images, is moved away from what the network predicts, and then scaled down to the radius.
    There are always at least as many steps as passes: the number of batches is rounded up.

    Args:
        precision: see :func:`bdprune.runtime.plan_for`.

    Raises:
        ArchitectureError: no conv has a weight of its own.
        OptionError: an unknown precision.
        TrainingError: the last loss of an epoch is not finite.
    """
    masked = SoftMasks(model)
    plan = plan_for(precision, masked, data.images)
    data = data.subset(torch.arange(len(data)).repeat(settings.copies))
    optimizer = torch.optim.Adam(masked.masks.parameters(), settings.lr)
    generator = torch.Generator().manual_seed(seed)
    batches = (settings.passes, settings.batch_size, settings.padding, generator, model.device)
    for epoch in range(settings.epochs):
        shift = _perturbation(masked, plan, _chained(passes(data, *batches)), settings)
        loss = torch.zeros(())
        for images, labels in _chained(passes(data, *batches)):
            moved = cross_entropy(plan.logits(masked, (images + shift).clamp(0, 1)), labels)
            plain = cross_entropy(plan.logits(masked, images), labels)
            size = torch.stack([mask.sum() for mask in masked.masks]).sum()
            loss = settings.alpha * plain + (1 - settings.alpha) * moved + settings.sparsity * size
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            masked.clamp_()
        if not loss.isfinite():
            raise TrainingError(f"The loss of the masks is {loss.item()} in epoch {epoch + 1}.", "Lower lr.")
    return masked


def _perturbation(
    masked: SoftMasks, plan: Plan, batches: Iterable[tuple[Tensor, Tensor]], settings: SoftMaskSettings
) -> Tensor:
    """``[C, H, W]``: the perturbation that leads most away from the network's own predictions, within the radius."""
    shift: Tensor | None = None
    for images, _ in batches:
        shift = (torch.zeros_like(images[0]) if shift is None else shift).requires_grad_()
        with torch.no_grad():
            predicted = plan.logits(masked, images).argmax(1)
        moved = plan.logits(masked, images + shift)  # not cut to [0, 1], as in the paper's code
        loss = cross_entropy(moved, predicted)
        (gradient,) = torch.autograd.grad(loss, shift)
        shift = (shift + settings.attack_lr * gradient).detach()
    assert shift is not None
    radius = settings.radius * shift.numel() / _VALUES
    return shift * (radius / shift.abs().sum().clamp(min=radius))


def _chained(shuffled: Iterable[Iterable[tuple[Tensor, Tensor]]]) -> Iterator[tuple[Tensor, Tensor]]:
    for batches in shuffled:
        yield from batches
