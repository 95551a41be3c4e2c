"""The forms of results in a notebook, in a real browser: readable on a light and on a dark page."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdprune.record import InvertResult, PurifyResult, Result
from bdprune.report import html_fragment

from .chromium import Chromium


@pytest.mark.parametrize("colours", ["background: #fff; color: #111", "background: #111; color: #eee"])
@pytest.mark.parametrize("doctype", ["<!doctype html>", ""])
def test_fragments_are_readable(
    browser: str,
    triggered: Result,
    repaired: PurifyResult,
    inverted: InvertResult,
    tmp_path: Path,
    colours: str,
    doctype: str,
) -> None:
    body = "".join(map(html_fragment, (triggered, repaired, inverted)))
    page = tmp_path / "page.html"
    page.write_text(f'{doctype}<meta charset="utf-8"><div style="{colours}">{body}</div>')
    with Chromium(browser, tmp_path / "profile") as chromium:
        chromium.open(page, "light", 600)
        ratio, text = chromium.worst_contrast("p, td, th, li, b, small, .pill, code")
        assert ratio >= 4.5, text
        assert chromium.problems == []
        assert chromium.value("document.documentElement.scrollWidth") <= 600
        assert chromium.value("[...document.images].every(one => one.naturalWidth > 0)")
