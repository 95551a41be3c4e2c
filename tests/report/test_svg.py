"""Charts: ticks, scales and shapes, compared with numbers computed by hand."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdprune.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, Bar, Line, Scale, bars, gauge, lines

XY = Axes("x", "y")


def tree(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{markup}</div>")


def test_a_scale_maps_its_ends() -> None:
    scale = Scale(10, 20, 100, 0)
    assert (scale(10), scale(15), scale(20)) == (100, 50, 0)


@pytest.mark.parametrize(
    ("low", "high", "count", "ticks"),
    [
        (0, 1, 4, [0, 0.25, 0.5, 0.75, 1]),
        (0, 9.87, 4, [0, 2.5, 5, 7.5]),
        (1, 24, 5, [5, 10, 15, 20]),
        (-3, 3, 5, [-2, 0, 2]),
        (0, 480, 4, [0, 200, 400]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, count: int, ticks: list[float]) -> None:
    assert Scale(low, high, 0, 1).ticks(count) == ticks


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_never_outside_or_too_many(low: float, span: float) -> None:
    ticks = Scale(low, low + span, 0, 1).ticks()
    assert len(ticks) <= 7
    assert all(low - 1e-6 * span - 1e-9 <= tick <= low + span * (1 + 1e-6) + 1e-9 for tick in ticks)


def test_bars_start_at_zero_and_have_proportional_heights() -> None:
    chart = tree(bars("Votes", [Bar(1, "one"), Bar(4, "four", marked=True)], XY))
    first, second = chart.iter("rect")
    low, high = float(first.get("height", "")), float(second.get("height", ""))
    assert high / low == pytest.approx(4, rel=1e-3)
    for bar in (first, second):
        assert float(bar.get("y", "")) + float(bar.get("height", "")) == pytest.approx(HEIGHT - BOTTOM, abs=0.02)
    assert second.get("class") == "bar marked" and first.get("class") == "bar"
    assert second.find("title").text == "four"  # type: ignore[union-attr]


def test_the_threshold_line_is_inside_even_above_all_bars() -> None:
    chart = tree(bars("z", [Bar(1, "a")], XY, cut=(5.0, "limit")))
    cut = next(line for line in chart.iter("line") if line.get("class") == "cut")
    assert TOP <= float(cut.get("y1", "")) <= HEIGHT - BOTTOM
    assert "limit" in [text.text for text in chart.iter("text")]


def test_lines_span_the_frame_and_shares_go_from_0_to_100() -> None:
    chart = tree(lines("CA", [Line("a", [(0, 0), (1, 1)]), Line("b", [])], XY, chosen=(0.5, "here")))
    points = chart.find(".//polyline").get("points", "").split()  # type: ignore[union-attr]
    assert points == [f"{LEFT:.1f},{HEIGHT - BOTTOM:.1f}", f"{WIDTH - RIGHT:.1f},{TOP:.1f}"]
    texts = [text.text for text in chart.iter("text")]
    assert "0 %" in texts and "100 %" in texts and "here" in texts
    assert chart.find("ul") is None  # one line needs no legend


def test_several_lines_have_a_legend() -> None:
    chart = tree(lines("CA", [Line("a", [(0, 0)]), Line("b", [(0, 1)], "b")], XY))
    assert ["".join(item.itertext()) for item in chart.iter("li")] == ["a", "b"]


def test_empty_and_flat_charts_do_not_fail() -> None:
    assert tree(lines("none", [], XY)).find(".//polyline") is None
    tree(lines("flat", [Line("a", [(3, 0.5)] * 2)], XY, percent=False))
    assert tree(bars("none", [], XY)).find(".//rect") is None
    tree(bars("zero", [Bar(0, "a"), Bar(-1, "b")], XY))


def test_some_names_under_many_bars_are_omitted() -> None:
    names = [f"layer{index}.conv" for index in range(40)]
    chart = tree(bars("z", [Bar(1, name, name=name) for name in names], XY))
    shown = [text for text in chart.iter("text") if (text.text or "").startswith("layer")]
    positions = [float(text.get("x", "")) for text in shown]
    assert 1 < len(shown) < 10
    assert all(right - left >= 8 * len("layer10.conv") for left, right in itertools.pairwise(positions))


def test_axes_of_counts_have_whole_numbers() -> None:
    drawn = [Line("a", [(1, 0), (3, 1)])]
    shown = {text.text for text in tree(lines("n", drawn, Axes("step", "share", whole=True))).iter("text")}
    assert {"1", "2", "3"} <= shown and not any("." in (one or "") for one in shown)
    assert "1.5" in {text.text for text in tree(lines("n", drawn, XY)).iter("text")}


def test_the_gauge_fills_with_the_risk() -> None:
    half = tree(gauge(0.5, "risk 0.5 of 1"))
    fill = next(path for path in half.iter("path") if path.get("class") == "fill")
    assert fill.get("stroke-dasharray", "").split()[0] == "78.54"
    assert half.find(".//title").text == "risk 0.5 of 1"  # type: ignore[union-attr]


def test_text_in_charts_is_escaped() -> None:
    chart = bars("<b>", [Bar(1, "<i>&", name="<s>")], Axes("<u>", "y"))
    assert "<b>" not in chart and "<i>" not in chart and "<u>" not in chart and "<s>" not in chart
    tree(chart)
