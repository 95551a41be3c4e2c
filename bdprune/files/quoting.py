"""Names that a file gives, as messages show them."""

from __future__ import annotations


def quoted(text: object, limit: int = 80) -> str:
    """``text`` quoted for a message: escapes control characters and cuts what a file made too long."""
    quoted = ascii(str(text)[: limit + 1])
    return quoted if len(quoted) <= limit else quoted[: limit - 3] + "..."


def join_path(path: tuple[object, ...]) -> str:
    """Keys that lead to a state dict, as they are shown and chosen: with ``/`` between them."""
    return "/".join(map(str, path))
