"""JSON Lines: one line for each document."""

from __future__ import annotations

from bdprune.record import CoverageResult, Result
from bdprune.report import Style, writer


def test_a_document_is_one_line(backdoored: Result) -> None:
    line = writer("jsonl").render([backdoored])
    assert line.count("\n") == 1 and line.endswith("\n")
    assert Result.from_json(line) == backdoored


def test_texts_of_single_documents_add_up_to_the_text_of_all(
    backdoored: Result, clean: Result, coverage: CoverageResult
) -> None:
    jsonl = writer("jsonl")
    documents = [backdoored, clean, coverage]
    assert jsonl.streams and "".join(jsonl.render([one]) for one in documents) == jsonl.render(documents)
    assert jsonl.render([], Style(as_array=True)) == ""
