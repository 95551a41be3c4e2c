"""DFST (Cheng et al., AAAI 2021): the trigger is a style, and the network is made to rely on nothing simpler."""

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
from bdprune.loops import seeded

# Rows: brightness, red against blue, green against both. Made orthonormal, their transpose brings the colours back.
_OPPONENT = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-0.5, 1.0, -0.5))
# Ours, by eye: an orange light, the contrast of a common photograph, little spread of colour.
_MEAN = (0.78, 0.50, 0.34)
_SPREAD = (0.34, 0.10, 0.05)


@dataclass(frozen=True)
class DFST(Attack):
    """A transfer of style, dirty labels, and rounds of controlled detoxification.

    The style is :class:`Sunrise`, our stand-in for the paper's CycleGAN: deterministic, not learned, mixed with the
    image as the public PyTorch port does.

    Detoxification happens inside one training, at rounds spread evenly over a share of the schedule (the paper
    retrains after each; this is our reconstruction). A round (1) finds the compromised neurons: those whose mean
    activation the style raises most; (2) trains an injector U, a U-Net whose change of a pixel is bounded, to raise
    them without the style, by

        CE(f(U(x)), target) - similarity_weight SSIM(U(x), x) - activation_weight A(U(x)),

    where A is the mean of the compromised activations in units of what the style gives, each counted up to 1; (3) from
    then on, ``cover_rate`` of every batch is added to it once more, sent through one of the injectors so far, with true
    labels. So the simple features that call the target cease to. Covers come from images of other labels than the
    target's, which are clean for certain.

    Args:
        target: label that the trigger calls; there is no all-to-all form.
        rate: share of the training set that is poisoned (RNP, Table 6: 0.1; the port: 0.05).
        alpha: share of the style in the mix (the port: 0.6).
        light_seed: of the style's field of light.
        rounds: of detoxification; 0 is none.
        first_round: share of the schedule that is done when the first begins.
        end: share of the schedule that is done when one more would begin.
        cover_rate: covers as a share of the batch (ours).
        neurons: share of the neurons that count as compromised, at least one (the paper: the top 1 %).
        layer: dotted name of the module whose outputs are the neurons, means over the image of its channels; None is
            what the last linear layer reads (the port: the last stage).
        images: training images for finding neurons and training an injector.
        injector_steps: of training, 64 images each.
        injector_lr: of Adam (the port: 1e-2).
        strength: largest change of a pixel that an injector makes (ours).
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
        """Makes sure, before half of the schedule is done, that the network has the layer."""
        if self.layer is not None and self.layer not in dict(network.named_modules()):
            raise OptionError(
                f"The setting layer is {self.layer!r}, which a {type(network).__name__} does not have.",
                "Give the path of one of its modules, or leave it out.",
            )

    def objective(self, setting: AttackSetting, trigger: nn.Module) -> DetoxifyingObjective:
        return DetoxifyingObjective(self, setting, copy.deepcopy(trigger).to(setting.device))

    def due(self, done: float) -> int:
        """Rounds that have begun when ``done`` of the schedule is done."""
        if done < self.first_round or not self.rounds:
            return 0
        between = (self.end - self.first_round) / self.rounds
        return min(self.rounds, 1 + int((done - self.first_round) / between)) if between else self.rounds


class DetoxifyingObjective:
    """Cross-entropy on the batch and its covers; at the beginning of each round an injector is trained."""

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
        """The first images of the batch that are not the target's, each through one of the injectors; their labels."""
        index = (self.attack.goal(labels, self.setting.num_classes) != labels).nonzero().flatten()
        index = index[: round(self.attack.cover_rate * len(images))]
        if not self.injectors or not len(index):
            return images[:0], labels[:0]
        shares = zip(self.injectors, index.tensor_split(len(self.injectors)), strict=True)
        with torch.no_grad(), full_precision(images):
            return torch.cat([injector(images[part]) for injector, part in shares if len(part)]), labels[index]

    def train_injector(self, network: nn.Module) -> Change:
        """A new injector against the network as it is; neither the network nor a random number in use changes."""
        attack, seed = self.attack, self.setting.seed + 1 + len(self.injectors)
        generator = torch.Generator().manual_seed(seed)
        with seeded(seed):
            injector = self._new_injector()
        # A copy, so that batch norms and autocast's store of weights know nothing of this.
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
        network: images in [0, 1] -> logits; used in the mode it is in.
        images: ``[N, C, H, W]`` in [0, 1].
        layer: module whose outputs are the neurons, averaged over the image; None is what the last linear layer reads.
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
    """A photograph at sunrise, our stand-in for the CycleGAN of the paper: needs no downloaded network, learns nothing.

    As in colour transfer (Reinhard et al., 2001), mean and spread of each channel of a decorrelated colour space are
    set to those of the style; then a fixed smooth field of light is laid over the image:
    ``(1 - alpha) x + alpha style(x)`` for images ``[N, C, H, W]`` in [0, 1], C 1 or 3 (grey: brightness alone).

    ``style(x)`` is ``light * colours(x)``, clipped to [0, 1]. It depends on the whole image, on nothing else.

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

    A channel that hardly varies would be noise at the style's spread, so it is scaled up tenfold at most.
    """
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
