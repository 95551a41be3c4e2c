"""The head of a network, its last linear layer, and the features that this layer reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdprune.model.handle import Model

_PROBE = 2  # images: for one image, squeezed logits look like a vector
_TOLERANCE = 1e-4  # relative to the largest logit


@dataclass(frozen=True)
class Head:
    """The last linear layer of a network: ``logits = features @ weight.T + bias``.

    Attributes:
        path: name of the layer in the network.
        weight: ``[K, F]``, on the CPU. A network with one logit z has the logits [0, z], so its first row is 0.
        bias: ``[K]``, on the CPU.
    """

    path: str
    weight: Tensor
    bias: Tensor


@torch.no_grad()
def find_head(model: Model) -> Head | None:
    """The linear layer whose output is the logits; None if there is none, as with a conv as the last layer."""
    images = torch.rand(_PROBE, *model.input_shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    calls: list[tuple[str, Tensor, Tensor]] = []
    layers = {path: child for path, child in model.network.named_modules() if isinstance(child, nn.Linear)}
    hooks = [
        layer.register_forward_hook(lambda _, given, out, path=path: calls.append((path, given[0], out)))
        for path, layer in layers.items()
    ]
    try:
        logits = model.module(images)
    finally:
        for hook in hooks:
            hook.remove()
    for path, features, _ in reversed(calls):
        head = _head_of(path, layers[path], model.num_classes)
        if features.dim() == 2 and _gives(head, features.cpu(), logits.cpu()):
            return head
    return None


def _head_of(path: str, layer: nn.Linear, num_classes: int) -> Head:
    weight = layer.weight.detach().float().cpu()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().float().cpu()
    if (len(weight), num_classes) == (1, 2):
        weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros_like(bias), bias])
    return Head(path, weight, bias)


def _gives(head: Head, features: Tensor, logits: Tensor) -> bool:
    if len(head.weight) != logits.shape[1] or len(features) != len(logits):
        return False
    found = features.float() @ head.weight.T + head.bias
    return bool((found - logits).abs().max() <= _TOLERANCE * logits.abs().max().clamp(min=1.0))


@contextmanager
def inputs_of(network: nn.Module, path: str) -> Iterator[list[Tensor]]:
    """Inside, every forward pass appends the input of the layer at ``path`` to the list."""
    seen: list[Tensor] = []
    hook = network.get_submodule(path).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        hook.remove()
