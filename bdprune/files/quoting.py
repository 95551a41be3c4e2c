"""Names that a file gives, as messages show them."""

from __future__ import annotations


def quoted(text: object, limit: int = 80) -> str:
    """``text`` quoted for a message: escapes control characters and cuts what a file made too long."""
    quoted = ascii(str(text)[: limit + 1])
    return quoted if len(quoted) <= limit else quoted[: limit - 3] + "..."
