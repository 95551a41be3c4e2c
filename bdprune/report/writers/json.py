"""JSON: indented for one result; an array with one line a result for several."""

from __future__ import annotations

from bdprune.report.base import Documents, Style, Writer


class JsonWriter(Writer):
    """One JSON text: an object for a single result, else an array."""

    title = "one JSON object, or an array of them"
    media_type = "application/json"
    suffixes = (".json",)

    def to_text(self, documents: Documents, style: Style) -> str:
        if len(documents) == 1 and not style.as_array:
            return f"{documents[0].to_json()}\n"
        lines = ",\n".join(one.to_json(indent=None) for one in documents)
        return f"[\n{lines}\n]\n" if lines else "[]\n"
