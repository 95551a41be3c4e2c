"""The shape of an image as a text."""

from __future__ import annotations

import re

from bdprune.errors import OptionError


def parse_shape(text: str) -> tuple[int, int, int]:
    """Channels, height and width from ``3x32x32``.

    Raises:
        OptionError: the text has another form.
    """
    if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}x[1-9]\d{0,4}", text):
        raise OptionError(f"Invalid input shape {text[:80]!r}.", "Give channels, height and width, as in 3x32x32.")
    channels, height, width = map(int, text.split("x"))
    return channels, height, width
