"""Formats and files: what goes where."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdprune.cli.outputs import Output, check_apart, plan
from bdprune.errors import OptionError, OutputError

KINDS = ("text", "json", "jsonl", "html")


def test_nothing_said_is_text_on_the_screen() -> None:
    assert plan([], [], KINDS, quiet=False) == [Output("text")]
    assert plan([], [], KINDS, quiet=True) == [Output("text")]


def test_formats_take_files_in_order(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in ("a", "b.html", "c.json"))
    assert plan(["json"], [], KINDS, False) == [Output("json")]
    assert plan(["json", "html"], [str(a), str(b)], KINDS, True) == [Output("json", a), Output("html", b)]
    assert plan([f"html={b}", "json"], [str(a)], KINDS, True) == [Output("html", b), Output("json", a)]
    assert plan([f"html={b}", "json"], [], KINDS, True) == [Output("html", b), Output("json")]
    assert plan([], [str(b), str(c)], KINDS, True) == [Output("html", b), Output("json", c)]
    assert plan(["json"], ["-"], KINDS, True) == [Output("json")]


def test_text_joins_when_everything_else_goes_to_files(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    assert plan([f"html={path}"], [], KINDS, quiet=False) == [Output("text"), Output("html", path)]
    assert plan(["json", f"html={path}"], [], KINDS, quiet=False) == [Output("json"), Output("html", path)]


@pytest.mark.parametrize(
    ("formats", "files", "words"),
    [
        (["xml"], [], "no format 'xml'"),
        (["html="], [], "no format 'html='"),
        (["json", "text"], [], "json and text would both go"),
        ([], ["report"], "does not tell its format"),
        ([], ["report.pdf"], "does not tell its format"),
    ],
)
def test_what_cannot_be_meant_is_refused(formats: list[str], files: list[str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        plan(formats, files, KINDS, quiet=False)


def test_files_are_checked_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        plan([f"html={tmp_path}/no/r.html"], [], KINDS, quiet=False)


def test_files_that_are_read_or_written_twice_are_refused(tmp_path: Path) -> None:
    model, report = tmp_path / "model.pth", tmp_path / "report.html"
    model.touch()
    check_apart([report, None, Path("/dev/null"), Path("/dev/null")], [model, None])
    with pytest.raises(OptionError, match=r"model\.pth is read and would be overwritten"):
        check_apart([tmp_path / "sub" / ".." / "model.pth"], [model])
    with pytest.raises(OptionError, match=r"report\.html is written already and would be overwritten"):
        check_apart([report, report], [])
