"""Output formats and their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

import bdprune
from bdprune import Result
from bdprune.cli import outputs
from bdprune.errors import OptionError, OutputError
from bdprune.files import PNG_SIGNATURE
from bdprune.report import writer
from bdprune.report.base import _places


def plan(formats: Sequence[str], files: Sequence[str], quiet: bool) -> list[Any]:
    """Names of the formats; with a file, (name, file)."""
    wanted = outputs.plan(formats, files, ("scan", "coverage"), quiet)
    return [(one.writer.name, one.path) if one.path else one.writer.name for one in wanted]


def test_the_default_is_text_on_the_screen() -> None:
    assert plan([], [], quiet=False) == plan([], [], quiet=True) == ["text"]


def test_formats_take_files_in_order(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in ("a", "b.html", "c.json"))
    assert plan(["json"], [], False) == ["json"]
    assert plan(["json", "html"], [str(a), str(b)], True) == [("json", a), ("html", b)]
    assert plan([f"html={b}", "json"], [str(a)], True) == [("html", b), ("json", a)]
    assert plan([f"html={b}", "json"], [], True) == [("html", b), "json"]
    assert plan([], [str(b), str(c)], True) == [("html", b), ("json", c)]
    assert plan(["json"], ["-"], True) == plan(["json=-"], [], True) == ["json"]


def test_text_is_added_if_all_other_formats_go_to_files(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    assert plan([f"html={path}"], [], quiet=False) == ["text", ("html", path)]
    assert plan(["json", f"html={path}"], [], quiet=False) == ["json", ("html", path)]


@pytest.mark.parametrize(
    ("formats", "files", "words"),
    [
        (["xml"], [], "no format 'xml'"),
        (["html="], [], "no format 'html='"),
        (["json", "text"], [], "json and text would both go"),
        ([], ["report"], "The suffix of 'report' names no format"),
        ([], ["report.pdf"], "The suffix of 'report.pdf' names no format"),
    ],
)
def test_contradictory_options_are_errors(formats: list[str], files: list[str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        plan(formats, files, quiet=False)


def test_only_a_streaming_format_is_live(tmp_path: Path) -> None:
    assert outputs.Output(writer("jsonl")).is_live
    assert outputs.Output(writer("jsonl"), tmp_path / "r.jsonl").is_live
    assert not outputs.Output(writer("json")).is_live


def test_a_stream_writes_each_result_at_once_and_keeps_its_brief_form(
    tmp_path: Path, scanned: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = scanned("a.pth"), scanned("b.pth")
    live: outputs.Stream[Result] = outputs.Stream([outputs.Output(writer("text"))], several=True)
    live.take(first)
    assert capsys.readouterr().out.startswith("SUSPICIOUS  a.pth")
    live.take(second)
    assert capsys.readouterr().out.startswith("\nSUSPICIOUS  b.pth"), "an empty line separates the blocks"
    assert [one.name for one in live.results] == ["a.pth", "b.pth"] and not live.results[0].detectors
    live.end(None, as_array=True)
    assert capsys.readouterr().out.endswith("\n  2 models: 2 suspicious\n")

    path = tmp_path / "r.jsonl"
    both = outputs.Stream([outputs.Output(writer("jsonl")), outputs.Output(writer("jsonl"), path)], several=True)
    both.take(first)
    assert path.read_text() == f"{first.to_json(indent=None)}\n", "the file has it at once"
    both.end(None, as_array=True)
    assert path.read_text() == capsys.readouterr().out == f"{first.to_json(indent=None)}\n"


def test_a_stream_that_cannot_be_ended_does_not_stop_the_other_outputs(
    tmp_path: Path, scanned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [
        outputs.Output(writer("text")),
        *(outputs.Output(writer(one), tmp_path / one) for one in ("jsonl", "json")),
    ]
    stream: outputs.Stream[Result] = outputs.Stream(wanted, several=True)
    stream.take(scanned("a.pth"))

    def closed(text: str) -> None:
        raise outputs.ClosedPipeError

    monkeypatch.setattr(outputs, "emit", closed)
    with pytest.raises(outputs.ClosedPipeError):
        stream.end(None, as_array=True)
    assert (tmp_path / "jsonl").read_text() and (tmp_path / "json").read_text()


@pytest.fixture
def scanned(tiny: Any) -> Any:
    """A suspicious result with evidence, of a file of any name."""

    def result(name: str) -> Result:
        found = bdprune.scan(tiny.path, detectors=["lipschitz"], arch=tiny.arch, input_shape=(3, 8, 8))
        assert found.detectors and found.artifact
        named = msgspec.structs.replace(found.artifact, path=name)
        return msgspec.structs.replace(found, artifact=named, verdict="suspicious", risk=0.5)

    return result


def test_files_are_checked_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        plan([f"html={tmp_path}/no/r.html"], [], quiet=False)


def test_files_that_are_read_or_written_twice_are_errors(tmp_path: Path) -> None:
    model, report = tmp_path / "model.pth", tmp_path / "report.html"
    model.touch()
    outputs.check_apart([report, None, Path("/dev/null"), Path("/dev/null")], [model, None])
    with pytest.raises(OptionError, match=r"model\.pth is read and would be overwritten"):
        outputs.check_apart([tmp_path / "sub" / ".." / "model.pth"], [model])
    outputs.check_apart([report], [tmp_path])
    (tmp_path / "image").write_bytes(PNG_SIGNATURE)
    for name in ("report.png", "sub/report.PNG", "image"):
        with pytest.raises(OptionError, match=r"is an image of the folder .*, which is read"):
            outputs.check_apart([tmp_path / name], [tmp_path])
    with pytest.raises(OptionError, match=r"report\.html is written already and would be overwritten"):
        outputs.check_apart([report, report], [])


TOY = """
from bdprune.report import Writer


class ToyWriter(Writer):
    title = "verdicts alone"
    media_type = "text/x-toy"
    suffixes = (".toy",)
    kinds = ("scan", "coverage")

    def to_text(self, documents, style):
        return "".join(f"{one.name}: {one.verdict}" for one in documents)
"""


def test_an_installed_writer_is_a_format_of_scans(
    run: Any, tiny: Any, model_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "toy_writer-1.dist-info"
    info.mkdir()
    (tmp_path / "toy_writer.py").write_text(TOY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-writer\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[bdprune.writers]\ntoy = toy_writer:ToyWriter\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("bdprune.report.base._places", _places.__wrapped__)
    first, second = tmp_path / "first", tmp_path / "second.toy"
    done = run(
        "scan", tiny.path, *model_args, "--detectors", "lipschitz", "-f", f"toy={first}", "-f", "toy", "-o", second
    )
    assert done.exit_code == 5, done.output
    assert first.read_text() == second.read_text() == f"{tiny.path}: inconclusive"
    assert "|toy[=FILE]" in run("scan", "--help").stdout.replace("\n", "").replace(" ", "")
    refused = run("score", tiny.path, *model_args, "-f", "toy")
    assert refused.exit_code == 4 and "The format toy cannot hold results of the kind score." in refused.stderr
    assert "toy" not in run("score", "--help").stdout
