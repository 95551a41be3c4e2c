"""Writers by name, by kind of document and by suffix, bdprune's own and plug-ins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bdprune.errors import OptionError
from bdprune.record import KINDS, CoverageResult, PurifyResult, Result
from bdprune.report import Writer, kind_of, names, writer, writer_of_file
from bdprune.report.base import _places

OURS = ["html", "json", "jsonl", "text"]
TOY = """
from bdprune.report import Writer


class ToyWriter(Writer):
    title = "verdicts alone"
    media_type = "text/x-toy"
    suffixes = (".toy",)
    kinds = ("scan", "coverage")

    def to_text(self, documents, style):
        return "".join(f"{one.name}: {one.verdict}, " for one in documents)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs a package with a module ``toy_writers`` and these entry points."""

    def write(*points: str) -> None:
        (tmp_path / "toy_writers.py").write_text(TOY)
        info = tmp_path / "toy_writers-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-writers\nVersion: 1\n")
        (info / "entry_points.txt").write_text("\n".join(["[bdprune.writers]", *points]) + "\n")
        monkeypatch.syspath_prepend(tmp_path)
        _places.cache_clear()

    yield write
    _places.cache_clear()


def test_built_in_writers_match_the_modules_and_describe_themselves() -> None:
    assert names() == OURS
    suffixes = [suffix for name in OURS for suffix in writer(name).suffixes]
    assert len(set(suffixes)) == len(suffixes) and all(suffix.startswith(".") for suffix in suffixes)
    for name in OURS:
        one = writer(name)
        assert one.name == name and one.title and "/" in one.media_type and set(one.kinds) == set(KINDS)
    assert [name for name in OURS if writer(name).streams] == ["jsonl", "text"]


def test_each_document_has_its_kind(backdoored: Result, repaired: PurifyResult, coverage: CoverageResult) -> None:
    assert [kind_of(one) for one in (backdoored, repaired, coverage)] == ["scan", "purify", "coverage"]


@pytest.mark.parametrize(("file", "name"), [("a.HTM", "html"), ("b/c.log", "text"), ("d.jsonl", "jsonl")])
def test_suffixes_name_formats(file: str, name: str) -> None:
    assert writer_of_file(Path(file), "scan").name == name


def test_unknown_names_and_suffixes_are_errors_that_list_the_known_ones() -> None:
    with pytest.raises(OptionError, match="no format 'xml'") as caught:
        writer("xml", "scan")
    assert "html, json, jsonl, text" in str(caught.value)
    with pytest.raises(OptionError, match=r"The suffix of 'report\.pdf' names no format") as caught:
        writer_of_file(Path("report.pdf"))
    assert "html|json|jsonl|text" in str(caught.value)


def test_a_plug_in_is_a_format_like_the_built_in_ones(
    install: Callable[..., None], backdoored: Result, clean: Result
) -> None:
    install("toy = toy_writers:ToyWriter")
    assert names("scan", "coverage") == [*OURS, "toy"] and names("scan", "purify") == OURS
    assert writer_of_file(Path("a.toy"), "scan").name == "toy"
    assert writer("toy").render([backdoored, clean]) == "models/badnets.pth: backdoored, models/clean.pth: clean, "


def test_an_unsupported_document_is_one_clear_error(
    install: Callable[..., None], backdoored: Result, repaired: PurifyResult
) -> None:
    install("toy = toy_writers:ToyWriter")
    for ask in (lambda: writer("toy").render([backdoored, repaired]), lambda: writer("toy", "purify")):
        with pytest.raises(OptionError, match="The format toy cannot hold results of the kind purify") as caught:
            ask()
        assert "html, json, jsonl, text" in str(caught.value)


@pytest.mark.parametrize("home", ["toy_writers:TOY", "toy_writers:missing", "no_such_module:A", "builtins:dict"])
def test_a_plug_in_that_fails_is_skipped_and_does_not_stop_the_others(
    install: Callable[..., None], caplog: pytest.LogCaptureFixture, home: str
) -> None:
    install(f"bad = {home}", "toy = toy_writers:ToyWriter")
    with caplog.at_level(logging.WARNING):
        assert names() == [*OURS, "toy"]
    assert "The format 'bad' cannot be loaded" in caplog.text
    assert writer("toy").name == "toy"
    with pytest.raises(OptionError, match="'bad' cannot be loaded"):
        writer("bad")


def test_a_plug_in_with_a_built_in_name_is_skipped(
    install: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        install("html = toy_writers:ToyWriter")
        assert writer("html").media_type == "text/html"
    assert "html of bdprune.writers" in caplog.text


def test_installed_packages_are_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("bdprune.registry.entry_points", lambda group: asked.append(group) or [])
    _places.cache_clear()
    for _ in range(3):
        names("scan")
        writer("json")
    assert asked == ["bdprune.writers"]
    _places.cache_clear()


def test_a_writer_must_define_text() -> None:
    with pytest.raises(TypeError):
        Writer("abstract")  # type: ignore[abstract]
