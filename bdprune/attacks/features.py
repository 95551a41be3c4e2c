"""The penultimate features of a network: what its last linear layer reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bdprune.attacks.base import Setting
from bdprune.errors import ArchitectureError, OptionError


def source_of(setting: Setting) -> nn.Module:
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

    Gradients with respect to the images alone, ``torch.autograd.grad(loss, images)``, leave the network untouched.

    Args:
        network: images in [0, 1] -> logits; used in the mode it is in.
        images: ``[N, C, H, W]`` in [0, 1], on the network's device.

    Raises:
        ArchitectureError: the network has no linear layer.
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    hook = head(network).register_forward_pre_hook(keep)
    try:
        network(images)
    finally:
        hook.remove()
    return seen[0]
