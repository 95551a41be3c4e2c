"""Quotes names from files for messages."""

from __future__ import annotations


def quoted(text: object, limit: int = 80) -> str:
    """``text`` quoted for a message, with control characters escaped, and cut to ``limit``."""
    quoted = ascii(str(text)[: limit + 1])
    return quoted if len(quoted) <= limit else quoted[: limit - 3] + "..."
