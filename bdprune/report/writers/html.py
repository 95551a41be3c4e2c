"""HTML: one file without scripts or external files, with all pictures in it. It escapes text from models and paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bdprune.record import CoverageResult, Document, Result, ScreenResult
from bdprune.report import screens, summary
from bdprune.report.base import Documents, Style, Writer
from bdprune.report.rendering import encodable, environment


class HtmlWriter(Writer):
    """One page for all results, in their order."""

    title = "a page with charts"
    media_type = "text/html"
    suffixes = (".html", ".htm")

    def to_text(self, documents: Documents, style: Style) -> str:
        return html_page(documents)


@dataclass(frozen=True)
class Table:
    """A table at the top of a page: its caption, the names of its columns, its rows, and a note below."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def html_page(documents: Documents, title: str = "", top: Table | None = None) -> str:
    """The page for these results, in their order; for several scans, a table at the top links to each.

    Args:
        documents: scans, screens, repairs and scores in any order, and the coverage of skipped files.
        title: of the page; by default a summary of the scans.
        top: a table before everything else.
    """
    results = [one for one in documents if isinstance(one, Document)]
    scans = [(index, one) for index, one in enumerate(results, 1) if isinstance(one, Result)]
    scans.sort(key=lambda pair: summary.rank(pair[1]))
    screened = sorted((one for one in documents if isinstance(one, ScreenResult)), key=screens.rank)
    tally = screens.tally(screened) if screened and not scans else summary.tally([one for _, one in scans])
    page = environment().get_template("report.html.j2")
    text = page.render(
        top=top,
        title=title or (results[0].name if len(results) == 1 else tally),
        documents=list(enumerate(results, 1)),
        scans=scans,
        screened=screened,
        tally=tally,
        coverages=[one for one in documents if isinstance(one, CoverageResult)],
        first=results[0] if results else None,
    )
    return encodable(text)
