"""Checks of an attack's settings; each raises ``OptionError`` with the value that was found and the mend."""

from __future__ import annotations

from bdprune.errors import OptionError


def check_share(name: str, value: float) -> None:
    """``value`` is in [0, 1]."""
    if not 0 <= value <= 1:
        raise OptionError(f"The setting {name} is {value}.", "Give a share between 0 and 1.")


def check_at_least(name: str, value: float, least: float) -> None:
    """``value`` is ``least`` or more."""
    if not value >= least:
        raise OptionError(f"The setting {name} is {value}.", f"Give {least} or more.")


def check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """``value`` is one of ``known``."""
    if value not in known:
        raise OptionError(f"The setting {name} is {value!r}.", f"Give one of {', '.join(known)}.")


def check_label(name: str, value: int, num_classes: int) -> None:
    """``value`` is a label of ``num_classes`` classes."""
    if not 0 <= value < num_classes:
        raise OptionError(
            f"The setting {name} is {value}, the images have {num_classes} classes.",
            f"Give a label from 0 to {num_classes - 1}.",
        )


def check_room(needed: int, shape: tuple[int, int, int]) -> None:
    """A trigger whose patches and margins take up ``needed`` pixels each way fits an image of ``shape`` (C, H, W)."""
    _, height, width = shape
    if needed > min(height, width):
        raise OptionError(
            f"The trigger needs {needed} pixels each way, the images are {height}x{width}.",
            "Give a smaller size or margin.",
        )
