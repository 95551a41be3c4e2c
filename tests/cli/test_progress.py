"""Progress: lines for logs, a live display for terminals, nothing when quiet."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdprune.cli.progress import Progress, rate, time_left


def run(total: int, shown: bool) -> None:
    with Progress(total, shown) as progress:
        for file in progress.through([Path(f"{index}\x1b.pth") for index in range(total)]):
            progress.stage("loading [bold]")
            with progress.paused():
                pass
            progress.finished("clean", str(file))


def test_a_log_gets_one_line_per_model(capsys: pytest.CaptureFixture[str]) -> None:
    run(2, shown=True)
    said = capsys.readouterr()
    assert said.err == "[1/2] clean  0\N{REPLACEMENT CHARACTER}.pth\n[2/2] clean  1\N{REPLACEMENT CHARACTER}.pth\n"
    assert said.out == ""


def test_a_log_shows_the_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 50.0, 100.0, 150.0])  # at the start, and as each of three models is done
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    with Progress(3, shown=True) as progress:
        for index in range(3):
            progress.finished("clean", f"{index}.pth")
    assert capsys.readouterr().err.splitlines() == [
        "[1/3] clean  0.pth  (about 1 min 40 s left)",
        "[2/3] clean  1.pth  (about 50 s left)",
        "[3/3] clean  2.pth",
    ]


def test_stored_results_take_no_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 50.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    with Progress(3, shown=True) as progress:
        progress.finished("clean", "0.pth", taken=True)
        progress.finished("clean", "1.pth")
        assert progress.done == 2
    assert capsys.readouterr().err.splitlines() == [
        "[1/3] clean (stored)  0.pth",
        "[2/3] clean  1.pth  (about 50 s left)",
    ]


def test_lines_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, shown=True) as progress:
        progress.line("a: loading\x1b", 71.0)
        progress.note("a: CLEAN")
    assert capsys.readouterr().err == "a: loading\N{REPLACEMENT CHARACTER}  (about 1 min 10 s left)\na: CLEAN\n"
    with Progress(1, shown=False) as progress:
        progress.line("a: loading", 71.0)
        progress.note("a: CLEAN")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("left", "text"),
    [(0.4, "almost done"), (9.6, "about 10 s left"), (59.9, "about 60 s left"), (127, "about 2 min 10 s left")],
)
def test_time_left_is_rounded(left: float, text: str) -> None:
    assert time_left(left) == text


@pytest.mark.parametrize(
    ("done", "seconds", "text"),
    [
        (0, 3.0, ""),
        (300, 10.0, "30 a second"),
        (3, 2.0, "1.5 a second"),
        (1, 20.0, "3.0 a minute"),
        (1, 7200.0, "0.5 an hour"),
    ],
)
def test_the_rate_has_a_unit_that_suits_it(done: int, seconds: float, text: str) -> None:
    assert rate(done, seconds) == text


def test_one_model_or_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run(1, shown=True)
    run(3, shown=False)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_live_line_on_stderr_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    run(2, shown=True)
    said = capsys.readouterr()
    assert said.out == "" and "loading [bold]" in said.err and "0/2" in said.err
    assert " a second · 2 clean" in said.err


def test_a_terminal_counts_down(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress(1, shown=True) as progress:
        progress.line("badnets: loading", 71.0)
        progress.note("badnets: BACKDOORED")
    said = capsys.readouterr().err
    assert "about 1 min 10 s left" in said and "badnets: BACKDOORED" in said and "0/1" not in said
