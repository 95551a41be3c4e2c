"""What MkDocs does besides, for this repository: pages from its root, and links to its other files.

The documents are written for a code host, where a relative link reaches every file. The site has the pages of ``docs/``
and of ``ROOT_PAGES``. A link to another file of the repository becomes plain text there; one to a file that does not
exist stays, and MkDocs warns of it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "RELEASING.md")
README = "README.md"  # its place on the site is taken by docs/index.md

_LINK = re.compile(r"(?P<text>!?\[(?:[^\[\]]|\[[^\[\]]*\])*\])\((?P<target>[^()\s#]*)(?P<anchor>#[^()\s]*)?\)")
_CODE = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)\s*$|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)", re.M | re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the root."""
    for name in ROOT_PAGES:
        if (ROOT / name).is_file():
            files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links as the site needs them."""
    return relinked(markdown, page.file.src_uri)


def relinked(markdown: str, source: str) -> str:
    """``markdown`` of the page ``source`` of the site with links between pages of the site only."""
    place = "" if source in ROOT_PAGES else posixpath.join("docs", posixpath.dirname(source))
    return outside_code(markdown, lambda text: _LINK.sub(lambda link: _linked(link, source, place), text))


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """``markdown`` with ``change`` made to all that is not code; code inside of a link stays in its place."""
    kept: list[str] = []

    def hide(code: re.Match[str]) -> str:
        kept.append(code[0])
        return f"\x00{len(kept) - 1}\x00"

    return re.sub("\x00(\\d+)\x00", lambda mark: kept[int(mark[1])], change(_CODE.sub(hide, markdown)))


def _linked(link: re.Match[str], source: str, place: str) -> str:
    target, anchor = link["target"], link["anchor"] or ""
    if not target or re.match(r"[a-z]+:", target):
        return link[0]
    path = posixpath.normpath(posixpath.join(place, target))
    page = _page(path)
    if page is not None:
        return f"{link['text']}({posixpath.relpath(page, posixpath.dirname(source) or '.')}{anchor})"
    is_image = link["text"].startswith("!")
    return link["text"][1:-1] if (ROOT / path).exists() and not is_image else link[0]


def _page(path: str) -> str | None:
    """Where the site has a file of the repository; None where it has not."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return "index.md" if path == README else path if path in ROOT_PAGES else None
