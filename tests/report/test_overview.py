"""The page over many scans, without a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest

from bdprune.record import ArtifactInfo, Result
from bdprune.report import Overview
from bdprune.report import overview as module

from .conftest import PICTURES
from .fleet import results

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&<!-- \u202e\u2028"


class Reader(HTMLParser):
    """The tags with their attributes, and the text of each kind of element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self._open[-1:]:
            self.text.setdefault(tag, []).append(data)

    def of(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        found = [attrs for name, attrs in self.tags if name == tag]
        return [one for one in found if all(one.get(key.rstrip("_")) == value for key, value in wanted.items())]


def page_of(*scans: Result, store: str = "scans.db") -> str:
    page = Overview()
    for one in scans:
        page.add(one, one.artifact.path if one.artifact else "model in memory", store)
    return page.page()


def named(result: Result, path: str, **fields: Any) -> Result:
    return msgspec.structs.replace(result, artifact=ArtifactInfo(path=path), **fields)


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_the_policy_names_the_hashes_of_the_script_and_the_styles(backdoored: Result) -> None:
    reader = Reader(page_of(backdoored))
    (policy,) = [one["content"] or "" for one in reader.of("meta") if "http-equiv" in one]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'" and rules["img-src"] == "data:"
    data, script = reader.text["script"]
    for name, text in (("script-src", script), ("style-src", reader.text["style"][0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
    assert json.loads(data)["rows"]


def test_the_page_loads_nothing_and_has_no_handlers(triggered: Result, clean: Result) -> None:
    page = page_of(triggered, clean)
    reader = Reader(page)
    assert not {tag for tag, _ in reader.tags} & {"link", "iframe", "object", "embed", "form", "base"}
    for _, attrs in reader.tags:
        assert not any(name.startswith("on") or name == "style" for name in attrs)
        assert (attrs.get("href") or "#").startswith("#")
        assert (attrs.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
    assert "url(" not in page and "@import" not in page and "http:" not in page and "https:" not in page


def test_totals_rules_and_rows_in_order_of_seriousness(
    backdoored: Result, clean: Result, inconclusive: Result, failed: Result
) -> None:
    page = page_of(clean, failed, inconclusive, backdoored)
    reader = Reader(page)
    verdicts = [one["data-verdict"] for one in reader.of("button") if "data-verdict" in one]
    assert verdicts == ["all", "backdoored", "suspicious", "error", "inconclusive", "clean"]
    assert re.findall(r"<b>([\d,]+)</b>", page) == ["4", "1", "0", "1", "1", "1"]
    assert [row[0] for row in data_of(page)["rows"]] == [0, 2, 3, 4]
    assert [one["data-search"] for one in reader.of("th") if "data-search" in one] == [
        "BD101",
        "BD000",
        "ArtifactError",
    ]
    assert len(reader.of("article")) == 3  # a clean model has no details
    assert "scans of 2026-11-20" in page


def test_without_javascript_the_page_is_a_table_with_links_to_details(triggered: Result, clean: Result) -> None:
    page = page_of(triggered, clean)
    table = page[page.index('id="table"') : page.index("</table>", page.index('id="table"'))]
    assert '<a href="#m1">models/badnets.pth</a>' in table and "models/clean.pth" in table
    assert "<noscript>" not in page  # everything is there
    assert 'id="controls" hidden' in page and page.count("data:image/png;base64,") == 3
    assert "<code>bdprune show scans.db models/badnets.pth</code>" in page


def test_many_models_are_a_short_table_without_javascript_and_say_so(clean: Result, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MOST_PLAIN_ROWS", 2)
    page = page_of(*(named(clean, f"{index}.pth") for index in range(1234)))
    table = page[page.index('id="table"') : page.index("</table>", page.index('id="table"'))]
    assert table.count("<tr>") == 1 + 2
    assert "shows the 2 most serious of 1,234 models. <code>bdprune export</code>" in page
    assert len(data_of(page)["rows"]) == 1234


def test_hostile_text_stays_text(backdoored: Result) -> None:
    assert backdoored.model is not None and backdoored.data is not None
    scan = msgspec.structs.replace(
        backdoored,
        artifact=ArtifactInfo(path=EVIL, state_key=EVIL, sets=(EVIL, "b")),
        model=msgspec.structs.replace(backdoored.model, arch=EVIL),
        data=msgspec.structs.replace(backdoored.data, class_names=(EVIL,) * 10),
        findings=tuple(msgspec.structs.replace(one, message=EVIL) for one in backdoored.findings),
        detectors=tuple(msgspec.structs.replace(one, detector=EVIL) for one in backdoored.detectors),
        env=msgspec.structs.replace(backdoored.env, version=EVIL),
        started=EVIL,
    )
    page = page_of(scan, store=EVIL)
    reader = Reader(page)
    assert [one.get("type") for one in reader.of("script")] == ["application/json", None]
    assert not any("onerror" in attrs for _, attrs in reader.tags)
    text = page[page.index('id="data">') + 10 : page.index("</script>", page.index('id="data">'))]
    assert not set(text) & set("<>&\u2028\u2029\u202e")
    assert data_of(page)["rows"][0][1] == EVIL.replace("\u202e", "�")
    assert "\u202e" not in page
    assert "<code>bdprune show" not in page and "<code>bdprune export</code> writes the whole result" in page


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("a b.pth", "bdprune show scans.db &#39;a b.pth&#39;"),
        ("-x.pth", "bdprune show -- scans.db -x.pth"),
        ("a\nb.pth", ""),
        ("a\udcff.pth", ""),
    ],
)
def test_commands_can_be_pasted(backdoored: Result, file: str, command: str) -> None:
    page = page_of(named(backdoored, file))
    assert (f"<code>{command}</code>" in page) if command else ("<code>bdprune show" not in page)


def test_only_the_most_serious_have_details_and_pictures(triggered: Result, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MOST_DETAILS", 3)
    size = sum(4 * (len(PICTURES[name]) // 3 + 1) for name in ("mask", "pattern", "stamped"))
    monkeypatch.setattr(module, "MOST_PICTURE_TEXT", 2 * size)
    page = page_of(*(named(triggered, f"{index}.pth", risk=index / 10) for index in (1, 4, 9, 2, 8, 3, 7, 5)))
    names = re.findall(r'<h2 id="t\d">.*?<span class="path">(.*?)</span>', page)
    assert names == ["9.pth", "8.pth", "7.pth"]
    assert page.count("data:image/png;base64,") == 2 * 3 and page.count("Its pictures are in the whole result.") == 1
    assert [row[13] for row in data_of(page)["rows"]] == [1, 2, 3, 0, 0, 0, 0, 0]


def test_models_of_several_stores_name_their_store(clean: Result) -> None:
    page = Overview()
    for store in ("a.db", "b.db"):
        page.add(named(clean, "same.pth"), "same.pth", store)
    text = page.page()
    assert len(page) == 2 and data_of(text)["stores"] == ["a.db", "b.db"]
    assert '<th scope="col">Store</th>' in text and '<td class="path">b.db</td>' in text
    assert '<th scope="col">Store</th>' not in page_of(clean)


def test_the_page_has_one_text_once_and_is_the_same_every_time() -> None:
    page = page_of(*results(400, PICTURES))
    assert page == page_of(*results(400, PICTURES))
    data = data_of(page)
    assert len(data["texts"]) == len(set(data["texts"])) and data["texts"].count("resnet18_cifar") == 1


def test_numbers_that_are_not_finite_do_not_break_the_data(clean: Result) -> None:
    page = page_of(msgspec.structs.replace(clean, seconds=float("nan"), risk=float("inf")))
    assert data_of(page)["rows"][0][2] is None
