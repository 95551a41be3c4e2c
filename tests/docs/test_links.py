"""Every relative link and anchor in the documents resolves, by the rules of GitHub."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCES = re.compile(r"^ *(```+).*?^ *\1 *$", re.M | re.S)
LINKS = re.compile(
    r"\]\(\s*<?(?P<inline>[^)\s>]+)>?[^)]*\)|\b(?:src|href)=[\"'](?P<html>[^\"']+)|^\[[^\]]+\]:\s*(?P<reference>\S+)",
    re.M,
)


def links(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "code", FENCES.sub("", page.read_text()))
    return [one["inline"] or one["html"] or one["reference"] for one in LINKS.finditer(text)]


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of headings, of HTML, and of the Python objects that a page documents."""
    text = FENCES.sub("", page.read_text())
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.*?)(?: +#+)? *$", text, re.M):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        count = sum(one == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", one) is not None for one in found)
        found.append(f"{slug}-{count}" if count else slug)
    found += re.findall(r"\b(?:id|name)=[\"']([^\"']+)", text)
    return frozenset([*found, *re.findall(r"^::: (\S+)", text, re.M)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_resolve(page: Path) -> None:
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        exists = target.exists() and target.is_relative_to(ROOT)
        if not exists or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = "# A `b` (c)\n\n[x](no.md#a) ![y](y.png 'title') `[z](z.md)` <img src='w.png'>\n\n# A b c\n"
    page.write_text(f"{text}\n```\n[v](v.md)\n```\n")
    assert links(page) == ["no.md#a", "y.png", "w.png"]
    assert anchors(page) == {"a-b-c", "a-b-c-1"}


def test_pages_and_links_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {one.name for one in PAGES}
    assert sum(len(links(page)) for page in PAGES) > 50
