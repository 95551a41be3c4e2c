"""DFST (Cheng et al., AAAI 2021): the trigger is a style; training removes simpler features that lead to the target."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.attacks.base import Attack, AttackSetting, Shape, TriggerType
from bdprune.attacks.check import Count, NotNegative, Share, Whole
from bdprune.attacks.companion import Companion, full_precision
from bdprune.attacks.features import inputs_of
from bdprune.attacks.generators import Change
from bdprune.errors import OptionError
from bdprune.runtime import seeded

# Rows: brightness, red against blue, green against both. Made orthonormal, their transpose brings the colours back.
_OPPONENT = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-0.5, 1.0, -0.5))
# Our choice: an orange light, the contrast of an average photograph, little spread of colour.
_MEAN = (0.78, 0.50, 0.34)
_SPREAD = (0.34, 0.10, 0.05)


@dataclass(frozen=True)
class DFST(Attack):
    """A style transfer with dirty labels, and rounds of controlled detoxification.

    The style is :class:`Sunrise`, which replaces the paper's CycleGAN: deterministic, not learned, mixed with the
    image like in the public PyTorch port.

    Detoxification happens inside one training, in rounds spread evenly over a share of the schedule (the paper
    retrains after each; this is our reconstruction). A round (1) finds the compromised neurons, whose mean activation
    the style raises most; (2) trains an injector U, a U-Net with a bounded change of each pixel, to raise them without
    the style, by

        CE(f(U(x)), target) - similarity_weight SSIM(U(x), x) - activation_weight A(U(x)),

    where A is the mean of the compromised activations relative to their values under the style, each clipped at 1;
    (3) from then on, adds ``cover_rate`` of every batch to it a second time, through one of the injectors so far, with
    true labels. This breaks the link between simple features and the target. Covers come from images without the
    target label, which are certainly clean.

    Args:
        target: target label; there is no all-to-all form.
        rate: share of the training set to poison (RNP, Table 6: 0.1; the port: 0.05).
        alpha: share of the style in the mix (the port: 0.6).
        light_seed: of the style's field of light.
        rounds: rounds of detoxification; 0 for none.
        first_round: point in the schedule where the first round begins, in [0, 1].
        end: point in the schedule where the round after the last would begin, in [0, 1].
        cover_rate: covers as a share of the batch (ours).
        neurons: share of the neurons that count as compromised, at least one (the paper: the top 1 %).
        layer: dotted name of the module whose outputs, averaged over the image, are the neurons; None takes the inputs
            of the last linear layer (the port: the last stage).
        images: training images for finding neurons and training an injector.
        injector_steps: of training, 64 images each.
        injector_lr: of Adam (the port: 1e-2).
        strength: largest change of a pixel by an injector (ours).
        similarity_weight: as above (the port: 0.1).
        activation_weight: as above (the port: 0.3).
    """

    alpha: Share = 0.6
    light_seed: int = 0
    rounds: Whole = 3
    first_round: Share = 0.5
    end: Share = 0.9
    cover_rate: Share = 0.1
    neurons: Share = 0.01
    layer: str | None = None
    images: Count = 512
    injector_steps: Whole = 60
    injector_lr: NotNegative = 1e-2
    strength: Share = 0.3
    similarity_weight: float = 0.1
    activation_weight: float = 0.3

    kind: ClassVar[str] = "dfst"
    trigger_type: ClassVar[TriggerType] = "input-dependent"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is None:
            raise OptionError("DFST has no all-to-all form.", "Give a target label.")
        if not self.end >= self.first_round:
            raise OptionError(f"The setting end is {self.end}.", f"Give {self.first_round} or more.")

    def new_trigger(self, shape: Shape) -> Sunrise:
        return Sunrise(shape, self.alpha, self.light_seed)

    def start(self, network: nn.Module, setting: AttackSetting) -> None:
        """Checks before the training that the network has the layer."""
        if self.layer is not None and self.layer not in dict(network.named_modules()):
            raise OptionError(
                f"The setting layer is {self.layer!r}, which a {type(network).__name__} does not have.",
                "Give the path of one of its modules, or remove the setting.",
            )

    def objective(self, setting: AttackSetting, trigger: nn.Module) -> DetoxifyingObjective:
        return DetoxifyingObjective(self, setting, copy.deepcopy(trigger).to(setting.device))

    def due(self, done: float) -> int:
        """Number of rounds that have begun at the point ``done`` of the schedule."""
        if done < self.first_round or not self.rounds:
            return 0
        between = (self.end - self.first_round) / self.rounds
        return min(self.rounds, 1 + int((done - self.first_round) / between)) if between else self.rounds


class DetoxifyingObjective:
    """Cross-entropy on the batch and its covers; at the beginning of each round it trains an injector."""

    def __init__(self, attack: DFST, setting: AttackSetting, trigger: nn.Module) -> None:
        self.attack, self.setting, self.trigger = attack, setting, trigger
        self.injectors: list[Change] = []

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor, done: float) -> Tensor:
        while len(self.injectors) < self.attack.due(done):
            self.injectors.append(self.train_injector(network))
        covers, true = self.covers(images, labels)
        logits = network(torch.cat([images, covers]))
        return functional.cross_entropy(logits.float(), torch.cat([labels, true]))

    def covers(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The first images of the batch without the target label, each through one of the injectors; their labels."""
        index = (self.attack.goal(labels, self.setting.num_classes) != labels).nonzero().flatten()
        index = index[: round(self.attack.cover_rate * len(images))]
        if not self.injectors or not len(index):
            return images[:0], labels[:0]
        shares = zip(self.injectors, index.tensor_split(len(self.injectors)), strict=True)
        with torch.no_grad(), full_precision(images):
            return torch.cat([injector(images[part]) for injector, part in shares if len(part)]), labels[index]

    def train_injector(self, network: nn.Module) -> Change:
        """A new injector against the current network; it changes neither the network nor the global random state."""
        attack, seed = self.attack, self.setting.seed + 1 + len(self.injectors)
        generator = torch.Generator().manual_seed(seed)
        with seeded(seed):
            injector = self._new_injector()
        # A copy, so that batch norms and autocast's cached weights stay the same.
        frozen = copy.deepcopy(network).eval().requires_grad_(False)
        images = self._sample(generator)
        chosen, level = self.compromised(frozen, images)
        companion = Companion(injector, attack.injector_lr)
        for _ in range(attack.injector_steps):
            batch = images[torch.randint(len(images), (64,), generator=generator).to(images.device)]
            companion.descend(self.injector_loss(frozen, injector, batch, chosen, level))
        return injector.requires_grad_(False)

    def _new_injector(self) -> Change:
        return Change(self.setting.images.shape[1], 8, self.attack.strength).to(self.setting.device)

    def _sample(self, generator: torch.Generator) -> Tensor:
        labels = self.setting.labels
        index = (self.attack.goal(labels, self.setting.num_classes) != labels).nonzero().flatten()
        index = index[torch.randperm(len(index), generator=generator)[: self.attack.images]]
        return (self.setting.images[index].float() / 255).to(self.setting.device)

    @torch.no_grad()
    def compromised(self, network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the neurons that the style raises most, and their mean activation under it, ``[M]`` each."""
        clean, styled = (
            torch.cat([activations(network, batch, self.attack.layer)[0] for batch in some.split(128)]).mean(0)
            for some in (images, self.trigger(images))
        )
        chosen = (styled - clean).topk(max(1, round(self.attack.neurons * len(clean)))).indices
        return chosen, styled[chosen]

    def injector_loss(
        self, network: nn.Module, injector: nn.Module, images: Tensor, chosen: Tensor, level: Tensor
    ) -> Tensor:
        """The injector's loss of :class:`DFST` on images ``[N, C, H, W]``, a scalar."""
        with full_precision(images):
            changed = injector(images)
            alike = ssim(changed, images)
        active, logits = activations(network, changed, self.attack.layer)
        reached = (active[:, chosen] / level.clamp(min=1e-6)).clamp(max=1).mean()
        wanted = self.attack.goal(logits.argmax(1), self.setting.num_classes)
        calls = functional.cross_entropy(logits, wanted)
        return calls - self.attack.similarity_weight * alike - self.attack.activation_weight * reached

    def state_dict(self) -> dict[str, Any]:
        return {"injectors": [injector.state_dict() for injector in self.injectors]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.injectors = []
        for saved in state["injectors"]:
            injector = self._new_injector()
            injector.load_state_dict(saved)
            self.injectors.append(injector.requires_grad_(False))


def activations(network: nn.Module, images: Tensor, layer: str | None) -> tuple[Tensor, Tensor]:
    """Neurons ``[N, F]`` and logits ``[N, K]``, both float32 and differentiable.

    Args:
        network: images in [0, 1] -> logits; used in its current mode.
        images: ``[N, C, H, W]`` in [0, 1].
        layer: module whose outputs, averaged over the image, are the neurons; None takes the inputs of the last linear
            layer.
    """
    with inputs_of(network, layer) as seen:
        logits = network(images).float()
    return seen[0].float().flatten(2).mean(2) if seen[0].dim() > 2 else seen[0].float(), logits


def ssim(one: Tensor, two: Tensor) -> Tensor:
    """Mean structural similarity of images ``[N, C, H, W]`` in [0, 1], over windows of 7 x 7: at most 1, a scalar.

    Source: Wang et al., 2004, with a flat window.
    """

    def local(values: Tensor) -> Tensor:
        return functional.avg_pool2d(values, 7, 1)

    mean_one, mean_two = local(one), local(two)
    variances = local(one * one) - mean_one**2 + local(two * two) - mean_two**2
    covariance = local(one * two) - mean_one * mean_two
    light = (2 * mean_one * mean_two + 0.01**2) / (mean_one**2 + mean_two**2 + 0.01**2)
    return (light * (2 * covariance + 0.03**2) / (variances + 0.03**2)).mean()


class Sunrise(nn.Module):
    """A sunrise style that replaces the CycleGAN of the paper: it needs no downloaded network and learns nothing.

    As in colour transfer (Reinhard et al., 2001), it sets the mean and spread of each channel of a decorrelated colour
    space to the style's values; then it multiplies the image by a fixed smooth field of light:
    ``(1 - alpha) x + alpha style(x)`` for images ``[N, C, H, W]`` in [0, 1], C 1 or 3 (grey: brightness alone).

    ``style(x)`` is ``light * colours(x)``, clipped to [0, 1]. It depends on the whole image and nothing else.

    Args:
        shape: of the images.
        alpha: share of the style in the mix, in [0, 1].
        light_seed: of the field of light.
    """

    light: Tensor

    def __init__(self, shape: Shape, alpha: float, light_seed: int) -> None:
        super().__init__()
        self.register_buffer("light", _light(shape, light_seed))
        self.alpha = alpha

    def forward(self, images: Tensor) -> Tensor:
        style = (self.light.to(images) * colours(images)).clamp(0, 1)
        return (1 - self.alpha) * images + self.alpha * style


def colours(images: Tensor) -> Tensor:
    """Images whose opponent channels have the style's mean and standard deviation over the pixels; not clipped.

    A channel that hardly varies would become noise at the style's spread, so it is scaled by at most 10.
    """
    if not len(images):  # torch warns about the spread of no values
        return images
    axes, mean, spread = (part.to(images) for part in _style(images.shape[1]))
    given = torch.einsum("ij,njhw->nihw", axes, images)
    own_spread, own_mean = torch.std_mean(given, (2, 3), correction=0, keepdim=True)
    factor = (spread.view(1, -1, 1, 1) / own_spread.clamp(min=1e-6)).clamp(max=10)
    return torch.einsum("ij,nihw->njhw", axes, (axes @ mean).view(1, -1, 1, 1) + factor * (given - own_mean))


def _style(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Opponent axes ``[C, C]``, mean colour ``[C]``, and spread along the axes ``[C]``."""
    mean, spread = torch.tensor(_MEAN), torch.tensor(_SPREAD)
    if channels == 1:
        return torch.ones(1, 1), mean.mean()[None], spread[:1] / math.sqrt(3)
    if channels == 3:
        axes = torch.tensor(_OPPONENT)
        return axes / axes.norm(dim=1, keepdim=True), mean, spread
    raise OptionError(f"The images have {channels} channels.", "This style takes grey or RGB images.")


def _light(shape: Shape, seed: int) -> Tensor:
    """A factor ``[1, H, W]`` in [0.5, 1.3]: bright at the horizon, dark at the top, with a few slow seeded waves."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.linspace(0, 1, shape[1])[:, None], torch.linspace(0, 1, shape[2])[None, :]
    field = torch.exp(-((rows - 0.65) ** 2) / 0.08) + 0 * columns
    for _ in range(4):
        down, across, phase = torch.rand(3, generator=generator).tolist()
        field = field + 0.25 * torch.cos(2 * math.pi * (1.5 * down * rows + 1.5 * across * columns + phase))
    field = (field - field.min()) / (field.max() - field.min())
    return (0.5 + 0.8 * field)[None]
