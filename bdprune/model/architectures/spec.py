"""The description of an architecture, from which a checkpoint is recognised and its network is built."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Settings: TypeAlias = dict[str, Any]

SHORTCUTS = ("shortcut", "downsample")
HEADS = ("linear", "fc", "classifier", "head")


@dataclass(frozen=True)
class Architecture:
    """One registered architecture.

    Attributes:
        name: such as ``resnet18_cifar``.
        make: builds the network from ``num_classes``, ``in_channels``, ``width`` and other settings from ``read``.
        read: reads those arguments from the names and shapes of a state dict; None if a required name is missing or
            has another number of dimensions. It may return a wrong guess: the caller compares every shape.
        width: width of the published network, in the architecture's own unit (see ``make``).
        input_size: height and width of the images it was made for.
        marks: names of which every state dict has at least one, for a fast rejection.
        lacks: names of which no state dict has any.
    """

    name: str
    make: Callable[..., nn.Module]
    read: Callable[[Shapes], Settings | None]
    width: int
    input_size: int
    marks: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()

    def may_fit(self, shapes: Shapes) -> bool:
        """Whether the marks allow a match. Cheap: builds no network."""
        return any(name in shapes for name in self.marks) and not any(name in shapes for name in self.lacks)


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
    """The first of ``candidates`` that is a part of some name, or the first candidate if none is."""
    parts = {part for name in shapes for part in name.split(".")}
    return next((candidate for candidate in candidates if candidate in parts), candidates[0])


def settings(stem: tuple[int, int, int] | None, head: tuple[int, int] | None, /, **more: Any) -> Settings | None:
    """Number of classes from the last layer, input channels and width from the first."""
    if stem is None or head is None:
        return None
    return {"num_classes": head[0], "in_channels": stem[1], "width": stem[0], **more}


def read_layers(shapes: Shapes, stem: str, head: str) -> Settings | None:
    """The settings given by the first conv and the last layer."""
    return settings(conv_shape(shapes, stem), linear_shape(shapes, head))


def read_cifar(shapes: Shapes, **more: Any) -> Settings | None:
    """The settings of a network with the first conv ``conv1`` and a last layer named in ``HEADS``."""
    head = spelling(shapes, HEADS)
    return settings(conv_shape(shapes, "conv1"), linear_shape(shapes, head), head=head, **more)


def numbered(shapes: Shapes, pattern: str) -> list[int]:
    """The sorted numbers that the only group of ``pattern`` matches among the names."""
    return sorted({int(match.group(1)) for name in shapes if (match := re.fullmatch(pattern, name))})


def rounded(channels: float) -> int:
    """The nearest multiple of 8 that loses less than 10 % (Sandler et al., 2018)."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest
