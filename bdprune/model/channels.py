"""Channels that were removed from a network, and the same change of tensors, shapes and layers.

A compact network has the layers of its architecture with fewer channels. For every changed layer, ``LayerChannels``
lists the channels that were kept, so that the network can be built again from the original architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Channels:
    """The kept channels of one side of a layer.

    Attributes:
        of: number of channels in the original layer.
        kept: their indices there, increasing.
    """

    of: int
    kept: tuple[int, ...]

    def then(self, later: Channels) -> Channels:
        """The kept channels after a second removal, whose indices count the channels that this one kept."""
        return Channels(self.of, tuple(self.kept[index] for index in later.kept))


@dataclass(frozen=True)
class LayerChannels:
    """The kept channels of a layer: of its outputs (filters), of its inputs, or None where all were kept."""

    outputs: Channels | None = None
    inputs: Channels | None = None

    @property
    def sides(self) -> tuple[Channels | None, Channels | None]:
        """In the order of a weight's dimensions."""
        return self.outputs, self.inputs

    def then(self, later: LayerChannels) -> LayerChannels:
        """The kept channels after a second removal."""
        pairs = zip(self.sides, later.sides, strict=True)
        return LayerChannels(*(one.then(two) if one and two else one or two for one, two in pairs))


@dataclass(frozen=True)
class Compact:
    """What was removed from a network.

    Attributes:
        arch: the original architecture: a registered name, or ``module:callable``.
        layers: path of each changed layer -> its kept channels.
    """

    arch: str
    layers: Mapping[str, LayerChannels] = field(repr=False)

    def then(self, layers: Mapping[str, LayerChannels]) -> Compact:
        """The same after a second removal."""
        merged = dict(self.layers)
        for path, layer in layers.items():
            merged[path] = merged[path].then(layer) if path in merged else layer
        return Compact(self.arch, merged)


def sizes(layer: nn.Module) -> tuple[int, int] | None:
    """The number of output and input channels of a layer that can lose some, else None.

    Depthwise convs and norms have the same channels on both sides, which count as outputs; their inputs are 0.
    """
    if isinstance(layer, nn.Conv2d):
        if is_depthwise(layer):
            return layer.out_channels, 0
        return (layer.out_channels, layer.in_channels) if layer.groups == 1 else None
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, _BatchNorm | _InstanceNorm):
        return layer.num_features, 0
    return (layer.num_parameters, 0) if isinstance(layer, nn.PReLU) else None


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each filter of a conv reads one channel of its own."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels > 1


def narrowed(tensor: Tensor, layer: LayerChannels) -> Tensor:
    """The kept channels of a weight, bias or statistic of a layer: outputs in dimension 0, inputs in dimension 1."""
    for dim, side in enumerate(layer.sides):
        if side is not None and tensor.ndim > dim:
            tensor = tensor.index_select(dim, torch.tensor(side.kept, device=tensor.device))
    return tensor


def full_shapes(shapes: Shapes, layers: Mapping[str, LayerChannels]) -> Shapes | None:
    """The shapes before the removal; None if the given ones are not those after it."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        layer = layers.get(name.rpartition(".")[0], LayerChannels())
        whole = list(shape)
        for dim, side in enumerate(layer.sides[: len(shape)]):
            if side is not None:
                if shape[dim] != len(side.kept):
                    return None
                whole[dim] = side.of
        found[name] = tuple(whole)
    return found


def narrow_(network: nn.Module, layers: Mapping[str, LayerChannels]) -> None:
    """Removes channels from layers in place.

    Raises:
        ValueError: a layer does not exist, cannot lose channels, or has another number of them.
    """
    known = dict(network.named_modules())
    for path, layer in layers.items():
        module = known.get(path)
        size = sizes(module) if module is not None else None
        if module is None or size is None:
            raise ValueError(f"{path} is not a layer that can lose channels")
        for side, count in zip(layer.sides, size, strict=True):
            if side is not None and side.of != count:
                raise ValueError(f"{path} has {count} channels, not {side.of}")
        _narrow_layer(module, layer)


def _narrow_layer(module: nn.Module, layer: LayerChannels) -> None:
    depthwise = is_depthwise(module)
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(narrowed(parameter.detach(), layer), parameter.requires_grad))
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, narrowed(buffer, layer))
    outputs, inputs = (side and len(side.kept) for side in layer.sides)
    names: dict[type[nn.Module], tuple[str, ...]] = {
        nn.Conv2d: ("in_channels", "out_channels", "groups") if depthwise else ("out_channels",),
        nn.Linear: ("out_features",),
        nn.PReLU: ("num_parameters",),
    }
    own: tuple[str, ...] = next((found for kind, found in names.items() if isinstance(module, kind)), ("num_features",))
    values: dict[str, Any] = dict.fromkeys(own, outputs) if outputs else {}
    if inputs:
        values["in_features" if isinstance(module, nn.Linear) else "in_channels"] = inputs
    for name, value in values.items():
        setattr(module, name, value)
