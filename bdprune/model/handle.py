"""The model as every method sees it: a network, its normalisation, and its source file."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bdprune.errors import OptionError

if TYPE_CHECKING:
    from bdprune.files import Artifact
    from bdprune.model.channels import Compact
    from bdprune.model.groups import FilterGroup
import math


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation, in the units of images in [0, 1]. Empty tuples mean none."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class Normalized(nn.Module):
    """``network`` after its normalisation, so that inputs and triggers are in [0, 1] pixel space.

    Shape: images ``[N, C, H, W]`` in [0, 1] -> logits ``[N, K]``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, normalization: Normalization) -> None:
        super().__init__()
        self.network = network
        mean, std = torch.tensor(normalization.mean), torch.tensor(normalization.std)
        self.register_buffer("mean", mean.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, -1, 1, 1), persistent=False)
        self.is_identity = not normalization.mean

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalize(images))  # type: ignore[no-any-return]

    def normalize(self, images: Tensor) -> Tensor:
        """The input of the network."""
        return images if self.is_identity else (images - self.mean) / self.std


@dataclass(frozen=True)
class Model:
    """A loaded model. Methods read it and return new models; nothing changes a model that it is given.

    Attributes:
        network: the bare architecture in eval mode, float32, names as in the checkpoint.
        arch: registry name of the architecture, such as ``resnet18_cifar``.
        num_classes: number of logits K.
        input_shape: (channels, height, width) of one image.
        normalization: applied to images in [0, 1] before ``network``.
        artifact: the file it came from, None for a module passed in from Python.
        compact: the channels that were removed from ``arch``; None for a whole network.

    Raises:
        OptionError: the normalisation is for another number of channels.
    """

    network: nn.Module
    arch: str
    num_classes: int
    input_shape: tuple[int, int, int]
    normalization: Normalization = field(default_factory=Normalization)
    artifact: Artifact | None = None
    compact: Compact | None = None

    def __post_init__(self) -> None:
        given, channels = len(self.normalization.mean), self.input_shape[0]
        if given not in (0, 1, channels):
            hint = f"Give {channels} means and {channels} standard deviations, or one of each."
            raise OptionError(f"The normalisation is for {given} channels, the model takes {channels}.", hint)

    @property
    def module(self) -> nn.Module:
        """``network`` after its normalisation (with shared parameters): images in [0, 1] -> logits."""
        return Normalized(self.network, self.normalization).to(self.device).train(self.network.training)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.network.parameters()).device

    @cached_property
    def groups(self) -> tuple[FilterGroup, ...]:
        """Every conv with the norm that consumes its output."""
        from bdprune.model.groups import groups_of

        return groups_of(self.network, self.input_shape)

    def clone(self) -> Model:
        """A copy with its own parameters and buffers."""
        return replace(self, network=copy.deepcopy(self.network))

    def with_network(self, network: nn.Module) -> Model:
        """The same model data with another network of the same architecture."""
        return replace(self, network=network.eval())


_CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)

NORMALIZATIONS: dict[str, Normalization] = {
    "none": Normalization(),
    "imagenet": Normalization(_IMAGENET_MEAN, (0.229, 0.224, 0.225)),
    "cifar10": Normalization(_CIFAR10_MEAN, (0.2470, 0.2435, 0.2616)),
    "half": Normalization((0.5,), (0.5,)),
    "cifar100": Normalization((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    # The standard deviations of the image means, not of the pixels; training repositories copy them from each other.
    "cifar10-old": Normalization(_CIFAR10_MEAN, (0.2023, 0.1994, 0.2010)),
    "gtsrb": Normalization((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
    "mnist": Normalization((0.1307,), (0.3081,)),
    # Networks fed with values from 0 to 255, without and with the mean subtracted (Caffe's convention).
    "bytes": Normalization((0.0,), (1 / 255,)),
    "caffe": Normalization(_IMAGENET_MEAN, (1 / 255,) * 3),
}
"""Most common first. A single value applies to every channel."""

GRAY_ONLY = frozenset({"mnist"})
"""Names of the normalisations that make no sense for colour images."""


def parse_normalization(text: str) -> Normalization:
    """The normalisation that ``text`` names or spells out in numbers.

    Args:
        text: a name in ``NORMALIZATIONS``, or means and then standard deviations, separated by commas, such as
            ``0.5,0.5,0.5,0.25,0.25,0.25``, in the units of images in [0, 1]. One pair applies to every channel.

    Raises:
        OptionError: an unknown name, invalid numbers, an odd count, or a standard deviation that is not above 0.

    Example:
        >>> parse_normalization("0.5,0.25")
        Normalization(mean=(0.5,), std=(0.25,))
    """
    name = text.strip().lower()
    return NORMALIZATIONS[name] if name in NORMALIZATIONS else _spelled_out(text)


def normalization_name(normalization: Normalization) -> str:
    """The value of ``--normalize`` for ``normalization``: its name or its numbers."""
    for name, known in NORMALIZATIONS.items():
        if known == normalization:
            return name
    return ",".join(f"{value:g}" for value in (*normalization.mean, *normalization.std))


def _spelled_out(text: str) -> Normalization:
    hint = f"Give one of {', '.join(NORMALIZATIONS)}, or numbers as in m1,m2,m3,s1,s2,s3."
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(f"Unknown normalisation {text[:80]!r}.", hint) from error
    if len(values) % 2:
        what = f"{text[:80]!r} has {len(values)} number{'s' if values[1:] else ''}, an odd count."
        raise OptionError(what, "Give all means, then as many standard deviations.")
    mean, std = values[: len(values) // 2], values[len(values) // 2 :]
    if not all(map(math.isfinite, values)) or min(std) <= 0:
        raise OptionError(f"{text[:80]!r} has a standard deviation of 0 or less, or a value that is not finite.", hint)
    return Normalization(tuple(mean), tuple(std))
