"""All known architectures."""

from __future__ import annotations

from typing import Any

from torch import nn

from bdprune.errors import OptionError
from bdprune.model.architectures import densenet, efficientnet, ibau, mobilenet, plain, preact, resnet, vgg, wide_resnet
from bdprune.model.architectures.spec import Architecture

_FAMILIES = (resnet, preact, wide_resnet, vgg, mobilenet, efficientnet, densenet, ibau, plain)
REGISTRY: dict[str, Architecture] = {entry.name: entry for family in _FAMILIES for entry in family.ARCHITECTURES}


def architecture(name: str) -> Architecture:
    """The registered architecture ``name``.

    Raises:
        OptionError: no architecture has that name.
    """
    if name not in REGISTRY:
        known = ", ".join(sorted(REGISTRY))
        raise OptionError(f"Unknown architecture {name!r}.", f"Known: {known}; or give module:callable.")
    return REGISTRY[name]


def build(name: str, num_classes: int, in_channels: int = 3, width: int | None = None, **settings: Any) -> nn.Module:
    """A freshly initialised network, in train mode.

    Args:
        name: registered name, such as ``resnet18_cifar``.
        num_classes: number of logits.
        in_channels: channels of the images.
        width: in the architecture's own unit, usually the channels of its stem; None takes the published width.
        settings: naming scheme and variant of this architecture, as its ``read`` returns them for a checkpoint.

    Raises:
        OptionError: no architecture has that name.
    """
    entry = architecture(name)
    width = entry.width if width is None else width
    return entry.make(num_classes=num_classes, in_channels=in_channels, width=width, **settings)
