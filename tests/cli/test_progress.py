"""Progress: lines for logs, a live display for terminals, nothing when quiet."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdprune.cli.progress import Progress


def run(total: int, shown: bool) -> None:
    with Progress(total, shown) as progress:
        for file in progress.through([Path(f"{index}\x1b.pth") for index in range(total)]):
            progress.stage("loading [bold]")
            with progress.paused():
                pass
            progress.finished("clean", str(file))


def test_log_gets_a_line_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    run(2, shown=True)
    said = capsys.readouterr()
    assert said.err == "[1/2] clean  0\N{REPLACEMENT CHARACTER}.pth\n[2/2] clean  1\N{REPLACEMENT CHARACTER}.pth\n"
    assert said.out == ""


def test_one_model_or_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run(1, shown=True)
    run(3, shown=False)
    assert capsys.readouterr() == ("", "")


def test_terminal_gets_a_live_line_on_stderr_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    run(2, shown=True)
    said = capsys.readouterr()
    assert said.out == "" and "loading [bold]" in said.err and "0/2" in said.err
