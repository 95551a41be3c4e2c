"""HTML: one file that stands alone. No script, no outside file; everything from a model or a path is escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup, escape

from bdprune.record import CoverageResult, Document, PurifyResult, Result, ScoreResult
from bdprune.report import charts, summary, svg


@dataclass(frozen=True)
class Table:
    """A table to put on top of a page: its caption, the names of its columns, its rows, and a note below."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def html_page(
    documents: Sequence[Document],
    title: str = "",
    top: Table | None = None,
    coverage: CoverageResult | None = None,
) -> str:
    """The page for these results, in their order; several scans get a table on top that leads to each.

    Args:
        documents: scans, repairs and scores, mixed as they like.
        title: of the page; by default what was scanned.
        top: what comes before everything else.
        coverage: what became of the files that have no result.
    """
    numbered = list(enumerate(documents, 1))
    scans = [(index, one) for index, one in numbered if isinstance(one, Result)]
    scans.sort(key=lambda pair: summary.rank(pair[1]))
    tally = summary.tally([one for _, one in scans])
    page = _environment().get_template("report.html.j2")
    text = page.render(
        top=top,
        title=title or (documents[0].name if len(documents) == 1 else tally),
        documents=numbered,
        scans=scans,
        tally=tally,
        coverage=coverage,
        env=documents[0].env if documents else None,
        started=documents[0].started if documents else "",
    )
    return text.encode(errors="replace").decode()  # a file name need not be UTF-8


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bdprune.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": summary.percent,
        "number": summary.number,
        "seconds": summary.seconds,
        "size": summary.size,
        "prose": _prose,
        "short_json": _short_json,
        "kind": _kind,
    }
    environment.globals |= {"summary": summary, "charts": charts, "svg": svg}
    return environment


def _prose(text: str) -> Markup:
    """Escaped text in which `commands` are set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _kind(document: Document) -> str:
    kinds = {Result: "scan", PurifyResult: "purify", ScoreResult: "score"}
    return next(name for kind, name in kinds.items() if isinstance(document, kind))


def _short_json(value: Any, limit: int = 400) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[:limit]} …"
