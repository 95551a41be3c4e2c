"""The penultimate features of a network: what its last linear layer reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from bdprune.attacks.base import AttackSetting
from bdprune.errors import ArchitectureError, OptionError


def source_of(setting: AttackSetting) -> nn.Module:
    """The trained network that an attack with ``needs_source`` was given.

    Raises:
        OptionError: it was given none.
    """
    if setting.source is None:
        raise OptionError("The attack learns on a trained network and was given none.", "Name its source.")
    return setting.source


def head(network: nn.Module) -> nn.Linear:
    """The last linear layer of ``network``, in the order of its modules.

    Raises:
        ArchitectureError: it has none.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ArchitectureError(
            f"A {type(network).__name__} has no linear layer, so it has no penultimate features.",
            "Give a network that ends in a linear layer.",
        )
    return layers[-1]


def penultimate(network: nn.Module, images: Tensor) -> Tensor:
    """What the last linear layer of ``network`` reads for these images, ``[N, F]``; differentiable.

    Gradients with respect to the images alone, ``torch.autograd.grad(loss, images)``, leave the network unpoisoned.

    Args:
        network: images in [0, 1] -> logits; used in the mode it is in.
        images: ``[N, C, H, W]`` in [0, 1], on the network's device.

    Raises:
        ArchitectureError: the network has no linear layer.
    """
    with inputs_of(network) as seen:
        network(images)
    return seen[0]


@contextmanager
def inputs_of(network: nn.Module, layer: str | None = None) -> Iterator[list[Tensor]]:
    """Inside, a forward pass appends what the last linear layer reads, or what the module ``layer`` gives."""
    seen: list[Tensor] = []
    if layer is None:
        hook = head(network).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    else:
        hook = network.get_submodule(layer).register_forward_hook(lambda _, inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()
