"""The penultimate features of a network: the inputs of its last linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from bdprune.attacks.base import AttackSetting
from bdprune.errors import ArchitectureError, OptionError


def source_of(setting: AttackSetting) -> nn.Module:
    """The trained network for an attack with ``needs_source``.

    Raises:
        OptionError: the setting has no source.
    """
    if setting.source is None:
        raise OptionError("The attack needs a trained network to learn on.", "Name its source.")
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
    """The inputs of the last linear layer of ``network`` for these images, ``[N, F]``; differentiable.

    Use ``torch.autograd.grad(loss, images)`` for gradients of the images, so that the network's parameters get none.

    Args:
        network: images in [0, 1] -> logits; used in its current mode.
        images: ``[N, C, H, W]`` in [0, 1], on the network's device.

    Raises:
        ArchitectureError: the network has no linear layer.
    """
    with inputs_of(network) as seen:
        network(images)
    return seen[0]


@contextmanager
def inputs_of(network: nn.Module, layer: str | None = None) -> Iterator[list[Tensor]]:
    """Inside, a forward pass appends the inputs of the last linear layer, or the outputs of the module ``layer``."""
    seen: list[Tensor] = []
    if layer is None:
        hook = head(network).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    else:
        hook = network.get_submodule(layer).register_forward_hook(lambda _, inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()
