"""The model as every method sees it: a network, its normalisation, and where it came from."""

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
    from bdprune.model.groups import FilterGroup


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation, in the units of images in [0, 1]. Empty tuples mean none."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class Normalized(nn.Module):
    """``network`` behind its normalisation, so that inputs (and so triggers) live in [0, 1] pixel space.

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
        """What the network is given."""
        return images if self.is_identity else (images - self.mean) / self.std


@dataclass(frozen=True)
class Model:
    """One loaded model. Methods read it and return new ones; nothing ever changes the one handed in.

    Attributes:
        network: the bare architecture in eval mode, float32, names as in the checkpoint.
        arch: registry name of the architecture, such as ``resnet18_cifar``.
        num_classes: number of logits K.
        input_shape: (channels, height, width) of one image.
        normalization: what is applied to images in [0, 1] before ``network``.
        artifact: the file it came from, None for a module that was handed over in Python.

    Raises:
        OptionError: the normalisation is for another number of channels.
    """

    network: nn.Module
    arch: str
    num_classes: int
    input_shape: tuple[int, int, int]
    normalization: Normalization = field(default_factory=Normalization)
    artifact: Artifact | None = None

    def __post_init__(self) -> None:
        given, channels = len(self.normalization.mean), self.input_shape[0]
        if given not in (0, 1, channels):
            hint = f"Give {channels} means and {channels} standard deviations, or one of each."
            raise OptionError(f"The normalisation is for {given} channels, the model takes {channels}.", hint)

    @property
    def module(self) -> nn.Module:
        """Network behind its normalisation (shares parameters with ``network``): images in [0, 1] -> logits."""
        return Normalized(self.network, self.normalization).to(self.device).train(self.network.training)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.network.parameters()).device

    @cached_property
    def groups(self) -> tuple[FilterGroup, ...]:
        """Every conv with the norm that consumes its output, found by tracing one forward pass."""
        from bdprune.model.groups import groups_of

        return groups_of(self.network, self.input_shape)

    def clone(self) -> Model:
        """A model with parameters and buffers of its own."""
        return replace(self, network=copy.deepcopy(self.network))

    def with_network(self, network: nn.Module) -> Model:
        """The same identity around another network of the same architecture."""
        return replace(self, network=network.eval())
