"""JSON: an object or an array."""

from __future__ import annotations

import json

from bdprune.record import CoverageResult, PurifyResult, Result
from bdprune.report import Style, writer


def test_one_document_is_an_object(backdoored: Result) -> None:
    assert Result.from_json(writer("json").render([backdoored])) == backdoored


def test_many_are_an_array_of_one_line_each(
    backdoored: Result, repaired: PurifyResult, coverage: CoverageResult
) -> None:
    text = writer("json").render([backdoored, repaired, coverage])
    assert [one["kind"] for one in json.loads(text)] == ["scan", "purify", "coverage"]
    assert len(text.splitlines()) == 5


def test_one_or_no_document_is_an_array_if_several_were_possible(backdoored: Result) -> None:
    assert [one["kind"] for one in json.loads(writer("json").render([backdoored], Style(as_array=True)))] == ["scan"]
    assert json.loads(writer("json").render([], Style(as_array=True))) == []
