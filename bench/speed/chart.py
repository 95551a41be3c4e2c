"""A bar chart as an SVG file: how many times faster ours is than the best PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import log2

WIDTH, LABELS, VALUES = 860, 400, 60
"""Pixels: the whole width, the labels on the left, and the numbers on the right."""
LINE, MARGIN = 18, 12

_STYLE = (
    "text{font:11px sans-serif;fill:#333}.name{font-weight:bold}.end{text-anchor:end}.middle{text-anchor:middle}"
    ".bar{fill:#3b6ea8}.bar.slower{fill:#c2492f}.grid{stroke:#ddd}.one{stroke:#222}"
)


def chart(title: str, groups: Mapping[str, Sequence[tuple[str, float]]]) -> str:
    """An SVG file with one bar per case on a logarithmic scale; a red bar to the left of 1 x is slower.

    Args:
        title: text above the bars, which screen readers read too.
        groups: the name of each benchmark, with the label and the factor of each case.
    """
    factors = [factor for cases in groups.values() for _, factor in cases]
    low, high = (log2(limit(1.0, *factors)) for limit in (min, max))
    scale = (WIDTH - LABELS - VALUES - MARGIN) / max(high - low, 1e-9)

    def place(factor: float) -> float:
        return LABELS + (log2(factor) - low) * scale

    top = 2 * LINE + MARGIN
    height = top + LINE * (len(groups) + len(factors)) + MARGIN
    parts = [f'<text class="name" x="{MARGIN}" y="{LINE}">{escape(title)}</text>']
    for power in range(int(low), int(high) + 1):
        parts += _grid_line(place(2.0**power), power, top, height)
    y = top
    for name, cases in groups.items():
        y += LINE
        parts.append(f'<text class="name" x="{MARGIN}" y="{y - 4}">{escape(name)}</text>')
        for label, factor in cases:
            y += LINE
            parts += _bar(label, factor, y, sorted((place(factor), place(1.0))))
    return "\n".join([_head(title, height), *parts, "</svg>", ""])


def _head(title: str, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>'
    )


def _grid_line(x: float, power: int, top: int, height: int) -> list[str]:
    kind = "grid" if power else "one"
    return [
        f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - MARGIN}"/>',
        f'<text class="middle" x="{x:.1f}" y="{top - 5}">{2.0**power:g} ×</text>',
    ]


def _bar(label: str, factor: float, y: int, ends: Sequence[float]) -> list[str]:
    left, right = ends
    kind = "bar" if factor >= 1 else "bar slower"
    return [
        f'<text x="{2 * MARGIN}" y="{y - 4}">{escape(label)}</text>',
        f'<rect class="{kind}" x="{left:.1f}" y="{y - 14}" width="{right - left:.1f}" height="12"/>',
        f'<text x="{right + 4:.1f}" y="{y - 4}">{factor:.2f} ×</text>',
    ]
