"""Removes pruned filters from a network where that changes no logit.

A filter can go if every layer that reads its channels always reads zero there. This is so for a filter that was pruned
with its norm's shift (``zero_gamma_beta``) or without any norm, up to the next conv or linear layer. It is not so if
the network adds other values to its channels (a residual connection), or moves zero elsewhere (a shift, a sigmoid), or
computes statistics over several channels (group norm, layer norm).

Pruned filters output constants, so whether a layer always reads zero does not depend on the other parameters. It is
tested on copies of the network in which those are random: there, a channel is zero for all images only if pruning made
it so. Then the logits of the whole and the compact network are compared on images.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bdprune.errors import ArchitectureError
from bdprune.files import Artifact
from bdprune.model.channels import Channels, Compact, LayerChannels, narrow_, narrowed, sizes
from bdprune.model.edit.coupled import Coupled, Couplings, Side
from bdprune.model.edit.stacked import without_tf32
from bdprune.model.handle import Model

_DRAWS, _IMAGES = 2, 8
_MOST_IMAGES = 64
_TOLERANCE = 1e-4  # relative to the largest logit: the order of float32 sums
_NOT_ZERO = "the layers that read its channels also read other values there"

Cuts = dict[tuple[str, Side], set[int]]


@dataclass(frozen=True)
class Compacted:
    """A compact network.

    Attributes:
        model: the compact model; the given one if nothing was removed.
        removed: number of filters that were removed.
        left: group -> why some of its pruned filters are still there, and how many.
        difference: largest difference of a logit from those of the whole network, on the tested images.
    """

    model: Model
    removed: int = 0
    left: Mapping[str, str] = field(default_factory=dict)
    difference: float = 0.0


@torch.no_grad()
def compact(model: Model, pruned: Mapping[str, Sequence[int]], images: Tensor) -> Compacted:
    """The same function with fewer channels; ``model`` does not change.

    Args:
        model: a model whose pruned filters output zero (``prune`` with the mode ``zero_gamma_beta`` or ``weights``).
        pruned: indices of the pruned filters by the name of their group.
        images: ``[N, C, H, W]`` in [0, 1], on which the logits are compared, besides random ones.

    Raises:
        OptionError: Torch-Pruning is not installed.
    """
    chosen = {group.name: (group.conv, list(pruned[group.name])) for group in model.groups if pruned.get(group.name)}
    try:
        couplings = Couplings(model.network, model.input_shape)
    except ArchitectureError as error:
        return Compacted(model, left=dict.fromkeys(chosen, error.message))
    zero = _zero_inputs(model) if chosen else {}
    cuts: dict[str, dict[int, Cuts]] = {}
    left: dict[str, str] = {}
    for name, (conv, filters) in chosen.items():
        found = couplings.of(conv, filters)
        reasons = {index: one.stop or ("" if _reads_zero(one, zero) else _NOT_ZERO) for index, one in found.items()}
        cuts[name] = {index: one.parts for index, one in found.items() if not reasons[index]}
        stay = [reason for reason in reasons.values() if reason]
        if stay:
            left[name] = _stays(len(stay), len(filters), stay[0])
    return _removed(model, cuts, left, images.to(model.device))


def _removed(model: Model, cuts: dict[str, dict[int, Cuts]], left: dict[str, str], images: Tensor) -> Compacted:
    """The model without these filters, or without those of the groups that pass the comparison."""
    for name in _emptied(model.network, cuts):
        left[name] = _stays(len(cuts[name]), len(cuts[name]), "a layer would lose all its channels")
        cuts[name] = {}
    cuts = {name: own for name, own in cuts.items() if own}
    probe = _probe(model, images)
    expected = _logits(model, probe)
    whole = _narrow(model, cuts)
    difference = _difference(whole, probe, expected)
    if difference is None:
        kept: dict[str, dict[int, Cuts]] = {}
        for name, own in cuts.items():
            if _difference(_narrow(model, {**kept, name: own}), probe, expected) is None:
                left[name] = _stays(len(own), len(own), "the logits would change")
            else:
                kept[name] = own
        cuts, whole = kept, _narrow(model, kept)
        difference = _difference(whole, probe, expected)
    if not cuts or whole is None:
        return Compacted(model, left=left)
    return Compacted(whole, sum(map(len, cuts.values())), left, difference or 0.0)


def _stays(count: int, total: int, reason: str) -> str:
    return f"{count} of {total} pruned filters stay: {reason}"


def _reads_zero(one: Coupled, zero: Mapping[str, Tensor]) -> bool:
    """Whether every layer that reads the coupled channels always reads zero."""
    return all(
        path in zero and bool(zero[path][list(channels)].all())
        for (path, side), channels in one.parts.items()
        if side == "inputs"
    )


def _zero_inputs(model: Model) -> dict[str, Tensor]:
    """For every conv and linear layer, whether each of its input channels is zero whatever the other parameters are."""
    generator = torch.Generator().manual_seed(0)
    zero: dict[str, Tensor] = {}
    for _ in range(_DRAWS):
        images = torch.randn(_IMAGES, *model.input_shape, generator=generator).to(model.device)
        shifts = torch.rand(1, generator=generator).item()
        state = generator.get_state()
        for sign in (1, -1):
            generator.set_state(state)
            _random_copy(model.network, generator, sign * (0.1 + shifts), zero)(images)
    return zero


def _random_copy(network: nn.Module, generator: torch.Generator, shift: float, zero: dict[str, Tensor]) -> nn.Module:
    """A copy in which every parameter that is not zero is random; its convs and linear layers write to ``zero``.

    Filters that output a constant keep it. All others are centred over the batch, so that no ReLU is dead, and then
    shifted by ``shift``: a constant zero, which is not due to their own parameters, is positive for one of its signs.
    """
    copied = copy.deepcopy(network).eval()
    for path, module in copied.named_modules():
        affine = isinstance(module, nn.Conv2d | nn.Linear | _BatchNorm | _InstanceNorm)
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias" and affine and isinstance(module.weight, Tensor):
                constant = (module.weight == 0).flatten(1).all(1) if module.weight.ndim > 1 else module.weight == 0
                parameter.copy_(torch.where(constant, parameter, shift))
                continue
            value = torch.randn(parameter.shape, generator=generator).to(parameter)
            fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 1
            parameter.copy_(torch.where(parameter == 0, 0, (value + 0.1 * value.sign()) / fan_in**0.5))
        if isinstance(module, _BatchNorm):
            module.train()
        elif isinstance(module, nn.Conv2d | nn.Linear):
            dim = 1 if isinstance(module, nn.Conv2d) else -1
            module.register_forward_pre_hook(lambda _, given, path=path, dim=dim: _note(zero, path, given[0], dim))
            module.register_forward_hook(lambda layer, _, out, dim=dim: _centred(layer, out, dim, shift))
    return copied


def _note(zero: dict[str, Tensor], path: str, x: Tensor, dim: int) -> None:
    """Adds one call of a layer: which of its input channels are zero (``dim`` counts them)."""
    found = x.movedim(dim, 0).flatten(1).eq(0).all(1)
    zero[path] = zero[path] & found if path in zero else found


def _centred(layer: nn.Module, out: Tensor, dim: int, shift: float) -> Tensor:
    """The output with ``shift`` as the mean of each channel, except for those of filters without weights."""
    flat = out.movedim(dim, -1)
    active = layer.get_parameter("weight").flatten(1).ne(0).any(1)
    mean = flat.mean(tuple(range(flat.ndim - 1)))
    return torch.where(active, flat - mean + shift, flat).movedim(-1, dim)


def _emptied(network: nn.Module, cuts: Mapping[str, Mapping[int, Cuts]]) -> list[str]:
    """Groups whose removal would leave a layer without channels on one side."""
    union = _union(cuts)
    empty = {part for part, channels in union.items() if len(channels) >= _count(network, part)}
    return [name for name, own in cuts.items() if any(part in empty for parts in own.values() for part in parts)]


def _count(network: nn.Module, part: tuple[str, Side]) -> int:
    found = sizes(network.get_submodule(part[0]))
    assert found is not None
    return found[part[1] == "inputs"]


def _union(cuts: Mapping[str, Mapping[int, Cuts]]) -> Cuts:
    union: Cuts = {}
    for own in cuts.values():
        for parts in own.values():
            for part, channels in parts.items():
                union.setdefault(part, set()).update(channels)
    return union


def _narrow(model: Model, cuts: Mapping[str, Mapping[int, Cuts]]) -> Model | None:
    """A copy without the channels; None if the layers do not agree on them."""
    union = _union(cuts)
    layers = {
        path: LayerChannels(*(_kept(model.network, (path, side), union) for side in ("outputs", "inputs")))
        for path in dict.fromkeys(path for path, _ in union)
    }
    network = copy.deepcopy(model.network)
    try:
        narrow_(network, layers)
    except (ValueError, IndexError):
        return None
    before = model.compact or Compact(model.arch, {})
    artifact = model.artifact and _narrow_artifact(model.artifact, layers)
    return replace(model, network=network.eval(), compact=before.then(layers), artifact=artifact)


def _kept(network: nn.Module, part: tuple[str, Side], union: Cuts) -> Channels | None:
    if part not in union:
        return None
    count = _count(network, part)
    return Channels(count, tuple(index for index in range(count) if index not in union[part]))


def _narrow_artifact(artifact: Artifact, layers: Mapping[str, LayerChannels]) -> Artifact:
    """The same file with narrower originals of its float64 and masked weights."""
    slots = {}
    for key, slot in artifact.slots.items():
        layer = layers.get(slot.name.rpartition(".")[0])
        if layer is not None and slot.original is not None:
            mask = None if slot.mask is None else narrowed(slot.mask, layer)
            slot = replace(slot, original=narrowed(slot.original, layer), mask=mask)
        slots[key] = slot
    return replace(artifact, slots=slots)


def _probe(model: Model, images: Tensor) -> Tensor:
    """Random images, then some of the given ones."""
    noise = torch.rand(_MOST_IMAGES // 2, *model.input_shape, generator=torch.Generator().manual_seed(0))
    return torch.cat([noise.to(model.device), images[: _MOST_IMAGES // 2]])


def _logits(model: Model, images: Tensor) -> Tensor:
    with without_tf32():
        found: Tensor = model.module(images)
    return found


def _difference(model: Model | None, images: Tensor, expected: Tensor) -> float | None:
    """The largest difference of a logit; None if it is more than rounding, or if the network cannot run."""
    if model is None:
        return None
    try:
        found = _logits(model, images)
    except Exception:  # a forward pass with fixed numbers of channels may raise anything
        return None
    if found.shape != expected.shape:
        return None
    difference = float((found - expected).abs().max())
    return difference if difference <= _TOLERANCE * max(float(expected.abs().max()), 1e-6) else None
