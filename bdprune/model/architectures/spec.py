"""What an architecture tells about itself, so that a checkpoint can be recognised and its network built."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Settings: TypeAlias = dict[str, Any]

HEADS = ("linear", "fc", "classifier", "head")


@dataclass(frozen=True)
class Architecture:
    """One entry of the registry.

    Attributes:
        name: such as ``resnet18_cifar``.
        make: builds the network from ``num_classes``, ``in_channels``, ``width`` and what else ``read`` returns.
        read: reads those arguments off the names and shapes of a state dict; None when a name it needs is missing
            or has another number of dimensions. It may be fooled: the caller compares every shape.
        width: of the published network, in the architecture's own unit (see ``make``).
        input_size: height and width of the images it was made for.
    """

    name: str
    make: Callable[..., nn.Module]
    read: Callable[[Shapes], Settings | None]
    width: int
    input_size: int


def conv_shape(shapes: Shapes, name: str) -> tuple[int, int, int] | None:
    """(out, in, kernel) of the square conv ``name``."""
    shape = shapes.get(f"{name}.weight", ())
    if len(shape) != 4 or min(shape) < 1 or shape[2] != shape[3]:
        return None
    return shape[0], shape[1], shape[2]


def linear_shape(shapes: Shapes, name: str) -> tuple[int, int] | None:
    """(out, in) of the linear layer ``name``."""
    shape = shapes.get(f"{name}.weight", ())
    return (shape[0], shape[1]) if len(shape) == 2 and min(shape) >= 1 else None


def spelling(shapes: Shapes, candidates: Sequence[str]) -> str:
    """The first of ``candidates`` that is a part of some name; the first one when none is."""
    parts = {part for name in shapes for part in name.split(".")}
    return next((candidate for candidate in candidates if candidate in parts), candidates[0])


def settings(stem: tuple[int, int, int] | None, head: tuple[int, int] | None, /, **more: Any) -> Settings | None:
    """Number of classes from the last layer, input channels and width from the first."""
    if stem is None or head is None:
        return None
    return {"num_classes": head[0], "in_channels": stem[1], "width": stem[0], **more}


def numbered(shapes: Shapes, pattern: str) -> list[int]:
    """The sorted numbers that the one group of ``pattern`` matches among the names."""
    return sorted({int(match.group(1)) for name in shapes if (match := re.fullmatch(pattern, name))})
