"""The page over 10,000 models in a real browser: quick, searchable, blocked from everything that it does not need."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bdprune.report import Overview
from bdprune.store import Store

from .chromium import Chromium
from .conftest import PICTURES
from .fleet import fill

COUNT = 10_000
MOST_BYTES = 5_000_000
MOST_SECONDS = 2.0
EVIL = (
    "</script><script>document.title = 'executed'</script>.pth",
    "<img src=x onerror=\"document.title = 'executed'\">.pth",
    "'\"><svg onload=\"document.title = 'executed'\">.pth",
    "`${document.title = 'executed'}` {{ 7 * 7 }} <!-- <script> \u2028.pth",
    "invoice\u202egnp.exe",
    "long/" + "x" * 5000,
)
ROWS = "[...document.getElementById('table').tBodies[0].rows]"
TEXTS = (
    "h1, h2, .pill, .note, #status, label, .totals button, #controls > button, thead button, tbody button, td, small"
)
NAMES = f"{ROWS}.map(row => row.cells[1]?.textContent)"


@pytest.fixture(scope="module")
def page(browser: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of 10,000 models and of some with hostile names; ``browser`` comes first, so that a skip is quick."""
    folder = tmp_path_factory.mktemp("fleet")
    made = Overview()
    with Store(fill(folder / "scans.db", COUNT, PICTURES, EVIL), writes=False) as store:
        for scan in store.scans():
            for one in scan.results:
                made.add(one, scan.name, "scans.db")
    path = folder / "report.html"
    path.write_text(made.page())
    return path


@pytest.fixture(scope="module")
def chromium(browser: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(browser, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def opened(chromium: Chromium, page: Path) -> Iterator[Chromium]:
    """The page, just opened. Nothing that a test does may cause an error, a violation of the policy or a request."""
    chromium.problems.clear()
    chromium.requests.clear()
    chromium.open(page, "light")
    yield chromium
    assert chromium.problems == []
    assert chromium.requests == [page.as_uri()]
    assert chromium.value("document.title") == f"bdprune: {COUNT + len(EVIL):,} models"


def click(chromium: Chromium, selector: str) -> None:
    """Clicks with the mouse in the middle of an element, as a reader does."""
    chromium.value(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center', behavior: 'instant'}})")
    box = f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])(document.querySelector({selector!r})"
    x, y = chromium.value(f"{box}.getBoundingClientRect())")
    for kind in ("mousePressed", "mouseReleased"):
        chromium.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


def search(chromium: Chromium, text: str) -> None:
    """Types into the search box, as a reader does."""
    click(chromium, "#search")
    chromium.value("document.getElementById('search').select()")
    chromium.ask("Input.insertText", text=text)


def status(chromium: Chromium) -> Any:
    return chromium.value("document.getElementById('status').textContent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_ten_thousand_models_are_small_and_open_quickly(chromium: Chromium, page: Path, scheme: str) -> None:
    assert page.stat().st_size <= MOST_BYTES
    chromium.problems.clear()
    times = []
    for _ in range(5):  # the shortest of five, because other tests run at the same time
        start = time.perf_counter()
        chromium.open(page, scheme)
        assert chromium.value(f"{ROWS}.length") == 200
        times.append(time.perf_counter() - start)
        if times[-1] <= MOST_SECONDS:
            break
    assert min(times) <= MOST_SECONDS
    assert chromium.problems == []
    pixels = np.asarray(Image.open(io.BytesIO(chromium.screenshot())).convert("L"))
    assert (np.median(pixels) > 128) == (scheme == "light") and pixels.std() > 5
    ratio, where = chromium.worst_contrast(TEXTS)
    assert ratio >= 4.5, where


def test_hostile_names_are_text(opened: Chromium) -> None:
    names = opened.value(f"{NAMES}.slice(0, {len(EVIL)})")
    shown = {name.split("#")[0] for name in names}
    assert {one.replace("\u2028", "�") if "\u2028" in one else one for one in EVIL[:3]} <= shown
    assert "invoice�gnp.exe" in shown and any("…" in name and len(name) < 1000 for name in shown)
    assert opened.value("document.querySelectorAll('img[src=x], svg[onload], main script').length") == 0
    for place in range(len(EVIL)):  # their details, too
        opened.value(f"{ROWS}.filter(row => !row.classList.contains('more'))[{place}].querySelector('button').click()")
    assert opened.value("document.querySelectorAll('#table .more .findings').length") == len(EVIL)
    assert opened.value("document.documentElement.scrollWidth <= innerWidth")


def test_search_finds_names_labels_and_rules(opened: Chromium) -> None:
    search(opened, "EXPERIMENT-01234")
    assert status(opened) == f"1–1 of 1 model, {COUNT + len(EVIL):,} in all"
    assert "experiment-01234" in opened.value(f"{NAMES}[0]")
    search(opened, "BD101 resnet18_cifar")
    assert opened.value(f"{ROWS}.every(row => /backdoored/.test(row.cells[0].textContent))")
    assert opened.value(f"{ROWS}.every(row => /resnet18_cifar/.test(row.textContent))")
    search(opened, '"label 8" vgg16')
    assert opened.value(
        f"{ROWS}.every(row => /label 8 \\(ship\\)/.test(row.textContent) && /vgg16/.test(row.textContent))"
    )
    search(opened, "no such model")
    assert opened.value(f"{ROWS}.map(row => row.textContent)") == ["No model matches."]
    assert status(opened) == f"0 of 0 models, {COUNT + len(EVIL):,} in all"


def test_verdicts_filter(opened: Chromium) -> None:
    click(opened, "[data-verdict=error]")
    assert opened.value(f"{ROWS}.every(row => row.cells[0].textContent === 'error')")
    total = opened.value("document.querySelector('[data-verdict=error] b').textContent")
    assert status(opened).startswith(f"1–{total} of {total} models")
    assert opened.value("document.querySelector('[data-verdict=error]').getAttribute('aria-pressed')") == "true"
    click(opened, "#attention")
    found = opened.value("+document.getElementById('status').textContent.match(/of (\\d+)/)[1]")
    totals = opened.value("[...document.querySelectorAll('.totals b')].map(one => +one.textContent.replace(',', ''))")
    assert found == sum(totals[1:4]) > 400
    click(opened, "#attention")  # again: all
    assert status(opened) == f"1–200 of {COUNT + len(EVIL):,} models"


def test_columns_sort(opened: Chromium) -> None:
    def sorted_by(place: int) -> Any:
        return opened.value(f"document.querySelectorAll('#table thead th')[{place}].ariaSort")

    first = opened.value(f"{NAMES}[0]")
    assert sorted_by(2) == "none"
    click(opened, "#table thead th:nth-child(8) button")  # time, the longest first
    assert sorted_by(7) == "descending"
    times = opened.value(f"{ROWS}.map(row => row.cells[7].textContent)")
    assert times[0] == "1 min 30 s" and sorted(times, reverse=True)[0] == times[0]
    click(opened, "#table thead th:nth-child(2) button")  # names, ascending; numbers in them as numbers
    assert (sorted_by(7), sorted_by(1)) == ("none", "ascending")
    names = [name for name in opened.value(NAMES) if name.startswith("registry/team-00/convnext")]
    numbers = [int(found[1]) for name in names if (found := re.search(r"experiment-(\d+)", name))]
    assert len(numbers) > 20 and numbers == sorted(numbers)
    click(opened, "#table thead th:nth-child(2) button")
    assert sorted_by(1) == "descending"
    click(opened, "#table thead th:nth-child(2) button")
    assert sorted_by(1) == "none" and opened.value(f"{NAMES}[0]") == first


def test_risks_sort_with_unknown_ones_last(opened: Chromium) -> None:
    for _ in range(2):
        click(opened, "#table thead th:nth-child(3) button")
        assert "–" not in opened.value(f"{ROWS}.map(row => row.cells[2].textContent)")


def test_pages_turn(opened: Chromium) -> None:
    assert opened.value("document.getElementById('before').disabled")
    click(opened, "#after")
    assert status(opened) == f"201–400 of {COUNT + len(EVIL):,} models"
    click(opened, "#before")
    assert status(opened).startswith("1–200 of")


def test_details_open_in_place_with_pictures(opened: Chromium) -> None:
    click(opened, "[data-verdict=backdoored]")
    place = len(EVIL) + 1
    row = f"#table > tbody > tr:nth-child({place})"
    click(opened, f"{row} button")
    assert opened.value(f"document.querySelector('{row} button').ariaExpanded") == "true"
    more = f"document.querySelector('{row} + .more')"
    assert "This network carries a backdoor" in opened.value(f"{more}.textContent")
    assert opened.value(f"[...{more}.querySelectorAll('img')].map(one => one.naturalWidth > 0)") == [True] * 3
    click(opened, f"{row} button")
    assert opened.value(more) is None


def test_a_clean_model_opens_with_the_command_for_the_rest(opened: Chromium) -> None:
    search(opened, "experiment-00004")
    click(opened, "#table tbody button")
    text = opened.value("document.querySelector('.more code').textContent")
    assert text.startswith("bdprune show 'scans.db' 'registry/team-04/") and text.endswith("safetensors'")


def test_a_rule_searches_the_table(opened: Chromium) -> None:
    click(opened, "[data-search=ArtifactError] button")
    assert opened.value("document.getElementById('search').value") == "ArtifactError"
    assert opened.value(f"{ROWS}.every(row => row.cells[0].textContent === 'error')")


def test_the_script_draws_the_rows_that_the_page_has_without_it(chromium: Chromium, page: Path) -> None:
    """Also: without JavaScript the most serious models are there, with links to their details."""
    cells = f"{ROWS}.slice(0, 200).map(row => [...row.cells].map(cell => cell.textContent))"
    chromium.open(page, "light")
    drawn = chromium.value(cells)
    chromium.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open(page, "light")
        assert chromium.value(cells) == drawn and len(drawn) == 200
        assert chromium.value("document.getElementById('controls').getClientRects().length") == 0
        assert "of 10,006 models" in chromium.value("document.querySelector('noscript').innerText")
        links = chromium.value("[...document.querySelectorAll('#table a')].map(one => one.getAttribute('href'))")
        assert len(links) == 200
        assert chromium.value(
            f"{links!r}.every(one => document.querySelector(one + ' .detail').getClientRects().length)"
        )
    finally:
        chromium.ask("Emulation.setScriptExecutionDisabled", value=False)


def test_other_scripts_and_styles_are_blocked_and_reported(chromium: Chromium, page: Path, tmp_path: Path) -> None:
    """The problems that this reports show that the tests above can fail."""
    more = "<script>document.title = 'ran'</script><style>body { color: red }</style><img src='https://127.0.0.1:9/x'>"
    changed = tmp_path / "changed.html"
    changed.write_text(page.read_text().replace("</body>", f"{more}</body>"))
    chromium.problems.clear()
    chromium.open(changed, "light")
    assert chromium.value("document.title") != "ran"
    assert chromium.value("getComputedStyle(document.body).color") != "rgb(255, 0, 0)"
    found = str(chromium.problems)
    assert all(rule in found for rule in ("script-src", "style-src", "img-src"))
