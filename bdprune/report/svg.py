"""Charts as inline SVG without scripts or external files; the style sheet of the page gives the colours."""

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
    """One bar: its height, its tooltip, whether it is highlighted, and the name below it."""

    value: float
    title: str
    marked: bool = False
    name: str = ""


@dataclass(frozen=True)
class Line:
    """One line through (x, y) points; ``kind`` names its colour: ``a``, ``b`` or ``c``."""

    name: str
    points: Sequence[tuple[float, float]]
    kind: str = "a"


@dataclass(frozen=True)
class Axes:
    """The names of the axes. ``whole``: the ticks of the x axis are whole numbers."""

    x: str
    y: str
    whole: bool = False


def bars(
    title: str,
    values: Sequence[Bar],
    axes: Axes,
    *,
    cut: tuple[float, str] | None = None,
    x_range: tuple[float, float] | None = None,
    chosen: tuple[float, str] | None = None,
) -> Markup:
    """A bar chart.

    Args:
        title: what the chart shows, read out by screen readers.
        values: the bars, from left to right; names that would overlap are left out.
        cut: (height, name) of a dashed horizontal line.
        x_range: numbers at the left and right end of the axis, instead of names.
        chosen: (x, name) of a dashed vertical line, in the numbers of ``x_range``.
    """
    top = max([*(bar.value for bar in values), cut[0] if cut else 0.0, 1e-9])
    low = min([*(bar.value for bar in values), 0.0])
    y = Scale(low, top * 1.05, HEIGHT - BOTTOM, TOP)
    slot = (WIDTH - LEFT - RIGHT) / max(len(values), 1)
    parts = [*_y_axis(y, _short), *(_bar(bar, LEFT + index * slot, slot, y) for index, bar in enumerate(values))]
    if x_range:
        x = Scale(*x_range, LEFT, WIDTH - RIGHT)
        parts += [*_x_axis(x), *([] if chosen is None else _cut_down(x(chosen[0]), chosen[1]))]
    else:
        parts += _names([bar.name for bar in values], slot)
    if cut is not None:
        height = y(cut[0])
        parts.append(_tag("line", class_="cut", x1=LEFT, x2=WIDTH - RIGHT, y1=height, y2=height))
        parts.append(_text("cut-name", cut[1], x=WIDTH - RIGHT, y=height - 5, text_anchor="end"))
    return _frame(title, parts, axes)


def lines(
    title: str, series: Sequence[Line], axes: Axes, *, percent: bool = True, chosen: tuple[float, str] | None = None
) -> Markup:
    """A line chart, with a legend if there are several lines.

    Args:
        title: what the chart shows, read out by screen readers.
        series: the lines; empty ones are left out.
        percent: the y axis is a share, drawn from 0 to 100 %.
        chosen: (x, name) of a dashed vertical line.
    """
    series = [line for line in series if line.points]
    xs = [x for line in series for x, _ in line.points] or [0.0]
    ys = [y for line in series for _, y in line.points] or [0.0]
    x = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, WIDTH - RIGHT)
    low, high = (0.0, 1.0) if percent else (min(0.0, *ys), max(1e-9, *ys))
    y = Scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [*_y_axis(y, _percent if percent else _short), *_x_axis(x, axes.whole)]
    parts += [] if chosen is None else _cut_down(x(chosen[0]), chosen[1])
    parts += [part for line in series for part in _line(line, x, y)]
    return _legend(series) + _frame(title, parts, axes)


def gauge(risk: float, title: str) -> Markup:
    """A half circle, filled in proportion to the risk in [0, 1]."""
    length, arc = 3.141593 * 50, "M10 60 A50 50 0 0 1 110 60"
    return _picture(
        "gauge",
        title,
        (120, 68),
        _tag("path", class_="track", d=arc),
        _tag("path", class_="fill", d=arc, stroke_dasharray=f"{length * risk:.2f} {length * 2:.2f}"),
        _tag("text", f"{risk:.2f}", x=60, y=56, text_anchor="middle"),
    )


def _tag(name: str, *inside: str, **attributes: object) -> Markup:
    """One element. All text in it is escaped; ``class_`` stands for ``class``, underscores for hyphens."""
    written = Markup("").join(
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"), f"{value:.2f}" if isinstance(value, float) else value
        )
        for key, value in attributes.items()
    )
    return Markup("<{name}{written}>{inside}</{name}>").format(
        name=name, written=written, inside=Markup("").join(inside)
    )


def _picture(kind: str, title: str, size: tuple[int, int], *parts: Markup) -> Markup:
    box = f"0 0 {size[0]} {size[1]}"
    return _tag("svg", _tag("title", title), *parts, class_=kind, viewBox=box, role="img", aria_label=title)


def _text(kind: str, text: str, **place: object) -> Markup:
    return _tag("text", text, class_=kind, **{"text_anchor": "middle", **place})


def _frame(title: str, parts: Sequence[Markup], axes: Axes) -> Markup:
    turned = f"translate(13 {(TOP + HEIGHT - BOTTOM) / 2:.1f}) rotate(-90)"
    below = _text("axis", axes.x, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6)
    return _picture("chart", title, (WIDTH, HEIGHT), *parts, below, _text("axis", axes.y, transform=turned))


def _y_axis(y: Scale, write: Callable[[float], str]) -> list[Markup]:
    grid = [_tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y(t), y2=y(t)) for t in y.ticks(4)]
    return grid + [_text("tick", write(t), x=LEFT - 6, y=y(t) + 4, text_anchor="end") for t in y.ticks(4)]


def _x_axis(x: Scale, whole: bool = False) -> list[Markup]:
    return [_x_tick(x(tick), _short(tick)) for tick in x.ticks() if not whole or tick == int(tick)]


def _x_tick(x: float, label: str) -> Markup:
    return _text("tick", label, x=x, y=HEIGHT - BOTTOM + 18)


def _names(names: Sequence[str], slot: float) -> list[Markup]:
    longest = max(map(len, names), default=0)
    every = max(1, ceil((longest * 9 + 8) / slot))
    return [_x_tick(LEFT + (index + 0.5) * slot, names[index]) for index in range(0, len(names), every)]


def _bar(bar: Bar, x: float, slot: float, y: Scale) -> Markup:
    top, bottom = sorted((y(bar.value), y(0)))
    width = min(slot - min(slot * 0.2, 4), WIDEST_BAR)
    kind = "bar marked" if bar.marked else "bar"
    place = {"x": x + (slot - width) / 2, "y": top, "width": width, "height": max(bottom - top, 0.8), "rx": 1.5}
    return _tag("rect", _tag("title", bar.title), class_=kind, **place)


def _cut_down(x: float, name: str) -> list[Markup]:
    after = x < (LEFT + WIDTH - RIGHT) / 2
    place = {"x": x + 6 if after else x - 6, "text_anchor": "start" if after else "end"}
    return [
        _tag("line", class_="cut", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM),
        _text("cut-name", name, y=HEIGHT - BOTTOM - 8, **place),
    ]


def _line(line: Line, x: Scale, y: Scale) -> list[Markup]:
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
    dots = [
        _tag(
            "circle",
            _tag("title", f"{line.name}: {_short(b)} at {_short(a)}"),
            class_=f"dot {line.kind}",
            cx=x(a),
            cy=y(b),
            r=3,
        )
        for a, b in (line.points if len(line.points) <= 60 else ())
    ]
    return [_tag("polyline", class_=f"line {line.kind}", points=path), *dots]


def _legend(series: Sequence[Line]) -> Markup:
    """A list above the chart, outside the SVG, so that it wraps on a narrow screen."""
    items = [_tag("li", _tag("span", class_=f"key {line.kind}"), line.name) for line in series]
    return _tag("ul", *items, class_="legend") if len(series) > 1 else Markup("")


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"
