"""``bdprune demo``: its table, its report and its exit code. The demonstration itself is tested in ``tests/fleet``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result as Ran

from bdprune.fleet.demo import Demo, Measured, Row, Watcher
from bdprune.fleet.scans import scan

Run = Callable[..., Ran]


@pytest.fixture
def outcome(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces the demonstration by one with these verdicts and true labels."""
    result = scan(tiny.path, tiny.data, arch=tiny.arch, input_shape=tiny.input_shape, detectors=["lipschitz"])

    def play(*cases: tuple[str, int | None, int | None]) -> None:
        import msgspec

        rows = []
        for verdict, label, truth in cases:
            found = msgspec.structs.replace(result, verdict=verdict, risk=0.9, target_label=label)
            before = Measured(0.934, None if truth is None else 0.997)
            after = Measured(0.921, 0.012) if verdict == "backdoored" else None
            rows.append(Row(f"model-{len(rows)}", truth, found, before, after))
        documents = tuple(row.result for row in rows)
        done = Demo(tuple(rows), documents, ("airplane", "automobile", "bird"), 61.0)

        def run(zoo: Path, out: Path, *, seed: int, watcher: Watcher) -> Demo:
            watcher.stage("model-0", "loading", 62.0)
            watcher.verdict("model-0", rows[0].result)
            return done

        monkeypatch.setattr("bdprune.fleet.run", run)

    return play


def test_all_right_is_exit_0_and_a_report(run: Run, outcome: Callable[..., None], tmp_path: Path) -> None:
    outcome(("clean", None, None), ("backdoored", 2, 2))
    done = run("demo", "-o", tmp_path / "new" / "out")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["model-0", "clean", "clean", "–", "right", "93.4", "%", "–"]
    assert "backdoor to 2 (bird)" in lines[2] and "99.7 % → 1.2 %" in lines[2] and "93.4 % → 92.1 %" in lines[2]
    assert lines[-1].strip().startswith("2 of 2 verdicts right, in 1 min 01 s. Report: ")
    page = (tmp_path / "new" / "out" / "report.html").read_text()
    assert page.index("2 of 2 verdicts right") < page.index("leads to label 2 (bird)")
    assert done.stderr == "model-0: loading  (about 1 min 00 s left)\nmodel-0: CLEAN\n"


def test_wrong_verdict_or_label_is_exit_1(run: Run, outcome: Callable[..., None], tmp_path: Path) -> None:
    for case in (("suspicious", 2, 2), ("backdoored", 1, 2), ("backdoored", 1, None)):
        outcome(case)
        done = run("demo", "-q", "-o", tmp_path)
        assert done.exit_code == 1 and "WRONG" in done.stdout and "0 of 1" in done.stdout


def test_missing_zoo_and_impossible_output_are_exit_4(run: Run, tmp_path: Path) -> None:
    done = run("demo", "--zoo", tmp_path / "nowhere", "-o", tmp_path / "out", "-q")
    assert done.exit_code == 4 and "There is no zoo in" in done.stderr
    (tmp_path / "file").write_text("x")
    done = run("demo", "-o", tmp_path / "file" / "out")
    assert done.exit_code == 4 and "cannot be written" in done.stderr
