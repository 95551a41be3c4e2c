"""The templates of HTML, and what they share. All text in them is escaped."""

from __future__ import annotations

import base64
import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from bdprune.report import screens, summary
from bdprune.report.base import kind_of

if TYPE_CHECKING:
    import jinja2

_HIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@cache
def environment() -> jinja2.Environment:
    """The templates of this package."""
    import jinja2  # only here, so that the help of a command does not load it

    from bdprune.report import charts, inspections, svg

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("bdprune.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    words = (summary.percent, summary.number, summary.seconds, summary.size)
    made.filters |= {word.__name__: word for word in words}
    made.filters |= {"prose": _prose, "short": short, "short_json": _short_json, "kind": kind_of, "base64": _base64}
    made.globals |= {
        "summary": summary,
        "charts": charts,
        "svg": svg,
        "inspections": inspections,
        "screens": screens,
    }
    return made


def encodable(text: str) -> str:
    """The text without lone surrogates: a file name need not be UTF-8."""
    return text.encode(errors="replace").decode()


def short(text: str, limit: int = 400) -> str:
    """The text, or its start if it is longer than ``limit`` characters."""
    return text if len(text) <= limit else f"{text[:limit]} …"


def _visible(value: Any) -> Any:
    """Text without control characters and without those that change the direction of writing."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _HIDDEN.sub("�", value)


def _prose(text: str) -> Markup:
    """Escaped text with `commands` as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(_visible(text)))))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _short_json(value: Any, limit: int = 400) -> str:
    return short(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), limit)
