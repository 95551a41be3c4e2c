"""The benchmark of reports, on a small store."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import report


def test_figures_of_a_small_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--models", "50", "--keep", str(tmp_path)]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    figures = {name: text.strip() for name, text in lines.items()}
    assert figures["models"] == "50" and (tmp_path / "report.html").stat().st_size > 50_000
    size, unit = figures["report"].split()
    assert float(size) == pytest.approx((tmp_path / "report.html").stat().st_size / 1e6, abs=0.01) and unit == "MB"
    assert 0.05 < float(figures["time to write"].split()[0]) < 60 and float(figures["peak memory"].split()[0]) > 10
    assert figures["time to open"] == "no browser on PATH" or float(figures["time to open"].split()[0]) > 0


def test_a_report_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="failed"):
        report.written(tmp_path / "none.db", tmp_path / "report.html")
