"""JSON and JSON Lines."""

from __future__ import annotations

import json

from bdprune.record import PurifyResult, Result
from bdprune.report.machine import json_array, json_document, json_line


def test_one_document_is_an_object(backdoored: Result) -> None:
    assert Result.from_json(json_document(backdoored)) == backdoored


def test_many_are_an_array_of_one_line_each(backdoored: Result, repaired: PurifyResult) -> None:
    text = json_array([backdoored, repaired])
    assert [one["kind"] for one in json.loads(text)] == ["scan", "purify"]
    assert len(text.splitlines()) == 4
    assert json.loads(json_array([])) == []


def test_a_line_is_one_line(backdoored: Result) -> None:
    line = json_line(backdoored)
    assert line.count("\n") == 1 and line.endswith("\n")
    assert Result.from_json(line) == backdoored
