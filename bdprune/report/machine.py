"""JSON and JSON Lines: for machines."""

from __future__ import annotations

from collections.abc import Sequence

from bdprune.record import CoverageResult, Document


def json_document(document: Document) -> str:
    """One result as indented JSON."""
    return f"{document.to_json()}\n"


def json_array(documents: Sequence[Document | CoverageResult]) -> str:
    """Many results as one JSON array, one line each."""
    lines = ",\n".join(document.to_json(indent=None) for document in documents)
    return f"[\n{lines}\n]\n" if lines else "[]\n"


def json_line(document: Document | CoverageResult) -> str:
    """One result as one line."""
    return f"{document.to_json(indent=None)}\n"
