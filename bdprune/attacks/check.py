"""Checks of an attack's settings; each raises ``OptionError`` with the value and a hint."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from bdprune.errors import OptionError


@dataclass(frozen=True)
class Range:
    """The range of a setting: from ``least`` to ``most``."""

    least: float
    most: float = math.inf


Share = Annotated[float, Range(0, 1)]
"""A share in [0, 1]."""
Count = Annotated[int, Range(1)]
"""A whole number from 1."""
Whole = Annotated[int, Range(0)]
"""A whole number from 0."""
NotNegative = Annotated[float, Range(0)]
"""A number from 0."""


def check_ranges(settings: Any) -> None:
    """Checks that every setting of a dataclass is in the range of its type; None is in any range."""
    kinds = get_type_hints(type(settings), include_extras=True)
    for name in (field.name for field in dataclasses.fields(settings)):
        kind, value = kinds[name], getattr(settings, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise OptionError(f"The setting {name} is {value!r}.", f"Give one of {', '.join(get_args(kind))}.")
        for one in getattr(kind, "__metadata__", ()):
            if value is not None and not one.least <= value <= one.most:
                hint = f"Give {one.least} or more." if one.most == math.inf else "Give a share between 0 and 1."
                raise OptionError(f"The setting {name} is {value}.", hint)


def check_label(name: str, value: int, num_classes: int) -> None:
    """Checks that ``value`` is a label of ``num_classes`` classes."""
    if not 0 <= value < num_classes:
        hint = f"Give a label from 0 to {num_classes - 1}."
        raise OptionError(f"The setting {name} is {value}, but the images have {num_classes} classes.", hint)


def check_fits(needed: int, shape: tuple[int, int, int]) -> None:
    """Checks that a trigger that needs ``needed`` pixels along each axis fits an image of ``shape`` (C, H, W)."""
    _, height, width = shape
    if needed > min(height, width):
        hint = "Give a smaller size or margin."
        raise OptionError(f"The trigger needs {needed}x{needed} pixels, but the images are {height}x{width}.", hint)
