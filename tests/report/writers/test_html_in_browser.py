"""The HTML report in a real browser: nothing is blocked or fails, and light and dark are both readable."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdprune.record import CoverageResult, Document
from bdprune.report import html_page

from ..chromium import Chromium

BRIGHTNESS = """
(() => {
  const brightness = color => color.match(/[\\d.]+/g).slice(0, 3).reduce((sum, part) => sum + +part, 0) / 765;
  const style = getComputedStyle(document.body);
  return [brightness(style.color), brightness(style.backgroundColor)];
})()
"""


@pytest.fixture(scope="module")
def chromium(browser: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(browser, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def report(everything: list[Document], coverage: CoverageResult, tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(html_page([*everything, coverage]))
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_renders_without_errors(chromium: Chromium, report: Path, scheme: str) -> None:
    chromium.problems.clear()
    chromium.open(report, scheme)
    text, background = chromium.value(BRIGHTNESS)
    assert chromium.problems == []
    assert (background > text) == (scheme == "light") and abs(background - text) > 0.5
    assert chromium.value("document.querySelectorAll('svg.chart').length") >= 8
    pixels = np.asarray(Image.open(io.BytesIO(chromium.screenshot())).convert("L"))
    assert (np.median(pixels) > 128) == (scheme == "light")
    assert pixels.std() > 5


@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_needs_no_horizontal_scrolling(chromium: Chromium, report: Path, width: int) -> None:
    chromium.open(report, "light", width)
    assert chromium.value("document.documentElement.scrollWidth") <= width


def test_a_script_in_the_report_is_blocked_and_reported(chromium: Chromium, report: Path) -> None:
    """The policy of the page blocks scripts. The problem that this reports shows that the tests above can fail."""
    report.write_text(report.read_text().replace("</body>", "<script>document.title = 'ran'</script></body>"))
    chromium.problems.clear()
    chromium.open(report, "light")
    assert chromium.value("document.title") != "ran"
    assert "Content Security Policy" in str(chromium.problems)
