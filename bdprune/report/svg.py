"""Charts as inline SVG: no script, no outside file, coloured by the style sheet of the page around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from markupsafe import Markup

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 74, 16, 16, 46
WIDEST_BAR = 44


@dataclass(frozen=True)
class Scale:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the range, about ``count`` of them."""
        rough = (self.high - self.low) / count
        power = 10.0 ** floor(log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
        first, last = ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9)
        return [round(index * step, 10) for index in range(first, last + 1)]


@dataclass(frozen=True)
class Bar:
    """One bar: its height, what a pointer reads on it, and whether it stands out."""

    value: float
    title: str
    marked: bool = False


@dataclass(frozen=True)
class Line:
    """One line through (x, y) points; ``kind`` names its colour: ``a``, ``b`` or ``c``."""

    name: str
    points: Sequence[tuple[float, float]]
    kind: str = "a"


def bars(
    title: str,
    values: Sequence[Bar],
    *,
    x_label: str,
    y_label: str,
    x_names: Sequence[str] = (),
    cut: float | None = None,
    cut_name: str = "threshold",
    x_range: tuple[float, float] | None = None,
) -> Markup:
    """A bar chart.

    Args:
        title: what the chart shows, read out by screen readers.
        values: the bars, from left to right.
        x_names: name of each bar, written below where there is room.
        cut: a dashed line across at this height.
        x_range: numbers at the left and right end of the axis, instead of names.
    """
    top = max([*(bar.value for bar in values), cut or 0.0, 1e-9])
    low = min([*(bar.value for bar in values), 0.0])
    y = Scale(low, top * 1.05, HEIGHT - BOTTOM, TOP)
    slot = (WIDTH - LEFT - RIGHT) / max(len(values), 1)
    shapes = [_bar(bar, LEFT + index * slot, slot, y) for index, bar in enumerate(values)]
    if x_range:
        x = Scale(*x_range, LEFT, WIDTH - RIGHT)
        below = [_x_tick(x(tick), _short(tick)) for tick in x.ticks()]
    else:
        below = _names(x_names, slot)
    across = [] if cut is None else [_cut_across(y(cut), cut_name)]
    return _frame(title, [*_y_axis(y, _short), *shapes, *below, *across], x_label, y_label)


def lines(
    title: str,
    series: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    percent: bool = True,
    chosen: tuple[float, str] | None = None,
    x_whole: bool = False,
) -> Markup:
    """A line chart, with a legend where there are several lines.

    Args:
        title: what the chart shows, read out by screen readers.
        series: the lines; empty ones are left out.
        percent: the y axis is a share, drawn from 0 to 100 %.
        chosen: (x, name) of a dashed line down.
        x_whole: the x axis counts, so only whole numbers are written.
    """
    series = [line for line in series if line.points]
    xs = [x for line in series for x, _ in line.points] or [0.0]
    ys = [y for line in series for _, y in line.points] or [0.0]
    x = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, WIDTH - RIGHT)
    low, high = (0.0, 1.0) if percent else (min(0.0, *ys), max(1e-9, *ys))
    y = Scale(low, high, HEIGHT - BOTTOM, TOP)
    ticks = [tick for tick in x.ticks() if not x_whole or tick == int(tick)]
    parts = [*_y_axis(y, _percent if percent else _short), *(_x_tick(x(tick), _short(tick)) for tick in ticks)]
    parts += [] if chosen is None else [_cut_down(x(chosen[0]), chosen[1])]
    parts += [_line(line, x, y) for line in series]
    return _legend(series) + _frame(title, parts, x_label, y_label)


def gauge(risk: float, title: str) -> Markup:
    """A half circle that fills with the risk, in [0, 1]."""
    length = 3.141593 * 50
    return Markup(
        '<svg class="gauge" viewBox="0 0 120 68" role="img" aria-label="{title}"><title>{title}</title>'
        '<path class="track" d="M10 60 A50 50 0 0 1 110 60"/>'
        '<path class="fill" d="M10 60 A50 50 0 0 1 110 60" stroke-dasharray="{filled:.2f} {rest:.2f}"/>'
        '<text x="60" y="56" text-anchor="middle">{risk:.2f}</text></svg>'
    ).format(title=title, filled=length * risk, rest=length * 2, risk=risk)


def _frame(title: str, parts: Sequence[Markup], x_label: str, y_label: str) -> Markup:
    middle = (LEFT + WIDTH - RIGHT) / 2
    return Markup(
        '<svg class="chart" viewBox="0 0 {w} {h}" role="img" aria-label="{title}"><title>{title}</title>{parts}'
        '<text class="axis" x="{middle:.1f}" y="{bottom}" text-anchor="middle">{x_label}</text>'
        '<text class="axis" transform="translate(13 {centre:.1f}) rotate(-90)" text-anchor="middle">{y_label}</text>'
        "</svg>"
    ).format(
        w=WIDTH,
        h=HEIGHT,
        title=title,
        parts=Markup("").join(parts),
        middle=middle,
        bottom=HEIGHT - 6,
        centre=(TOP + HEIGHT - BOTTOM) / 2,
        x_label=x_label,
        y_label=y_label,
    )


def _y_axis(y: Scale, write: Callable[[float], str]) -> list[Markup]:
    return [
        Markup(
            '<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            '<text class="tick" x="{before}" y="{text:.1f}" text-anchor="end">{label}</text>'
        ).format(left=LEFT, right=WIDTH - RIGHT, y=y(t), before=LEFT - 6, text=y(t) + 4, label=write(t))
        for t in y.ticks(4)
    ]


def _x_tick(x: float, label: str) -> Markup:
    return Markup('<text class="tick" x="{x:.1f}" y="{y}" text-anchor="middle">{label}</text>').format(
        x=x, y=HEIGHT - BOTTOM + 18, label=label
    )


def _names(names: Sequence[str], slot: float) -> list[Markup]:
    longest = max(map(len, names), default=0)
    every = max(1, ceil((longest * 9 + 8) / slot))
    return [_x_tick(LEFT + (index + 0.5) * slot, name) for index, name in enumerate(names) if index % every == 0]


def _bar(bar: Bar, x: float, slot: float, y: Scale) -> Markup:
    top, bottom = sorted((y(bar.value), y(0)))
    width = min(slot - min(slot * 0.2, 4), WIDEST_BAR)
    return Markup(
        '<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" width="{w:.2f}" height="{h:.2f}" rx="1.5">'
        "<title>{title}</title></rect>"
    ).format(
        kind="bar marked" if bar.marked else "bar",
        x=x + (slot - width) / 2,
        y=top,
        w=width,
        h=max(bottom - top, 0.8),
        title=bar.title,
    )


def _cut_across(y: float, name: str) -> Markup:
    return Markup(
        '<line class="cut" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        '<text class="cut-name" x="{right}" y="{text:.1f}" text-anchor="end">{name}</text>'
    ).format(left=LEFT, right=WIDTH - RIGHT, y=y, text=y - 5, name=name)


def _cut_down(x: float, name: str) -> Markup:
    after = x < (LEFT + WIDTH - RIGHT) / 2
    return Markup(
        '<line class="cut" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>'
        '<text class="cut-name" x="{text:.1f}" y="{y}" text-anchor="{anchor}">{name}</text>'
    ).format(
        x=x,
        top=TOP,
        bottom=HEIGHT - BOTTOM,
        text=x + 6 if after else x - 6,
        y=HEIGHT - BOTTOM - 8,
        anchor="start" if after else "end",
        name=name,
    )


def _line(line: Line, x: Scale, y: Scale) -> Markup:
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
    dots = Markup("").join(
        Markup(
            '<circle class="dot {kind}" cx="{cx:.1f}" cy="{cy:.1f}" r="3"><title>{name}: {b} at {a}</title></circle>'
        ).format(kind=line.kind, cx=x(a), cy=y(b), name=line.name, a=_short(a), b=_short(b))
        for a, b in (line.points if len(line.points) <= 60 else ())
    )
    return Markup('<polyline class="line {kind}" points="{path}"/>{dots}').format(kind=line.kind, path=path, dots=dots)


def _legend(series: Sequence[Line]) -> Markup:
    """A list above the chart, outside of it, so that it wraps on a narrow screen."""
    items = [
        Markup('<li><span class="key {kind}"></span>{name}</li>').format(kind=line.kind, name=line.name)
        for line in series
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items)) if len(series) > 1 else Markup("")


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"
