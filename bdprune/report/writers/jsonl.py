"""JSON Lines: a line for each result."""

from __future__ import annotations

from bdprune.report.base import Documents, Style, Writer


class JsonlWriter(Writer):
    """One line of JSON for each document."""

    title = "a line of JSON for each result, written as soon as it is ready"
    media_type = "application/jsonl"
    suffixes = (".jsonl", ".ndjson")
    streams = True

    def to_text(self, documents: Documents, style: Style) -> str:
        return "".join(f"{one.to_json(indent=None)}\n" for one in documents)
