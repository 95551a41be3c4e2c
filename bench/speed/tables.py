"""Text of numbers and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence


def duration(seconds: float) -> str:
    """Three digits and a unit: µs, ms, s, min or h."""
    for unit, size, limit in (("µs", 1e-6, 1e-3), ("ms", 1e-3, 1.0), ("s", 1.0, 120.0), ("min", 60.0, 7200.0)):
        if seconds < limit:
            return f"{digits(seconds / size)} {unit}"
    return f"{digits(seconds / 3600)} h"


def digits(value: float) -> str:
    """Three digits; all digits before the point of a larger number."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def span(values: Iterable[float], text: Callable[[float], str]) -> str:
    """The smallest and the largest value; one text if both read alike, and a dash without values."""
    ordered = sorted(values)
    if not ordered:
        return "–"
    ends = dict.fromkeys([text(ordered[0]), text(ordered[-1])])
    return " to ".join(ends)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join([_line(head), "|" + "---|" * len(head), *map(_line, rows), ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
