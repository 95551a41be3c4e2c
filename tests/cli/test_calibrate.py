"""``bdprune calibrate``: its options, files and errors. ``tests/fleet/test_calibration.py`` tests the calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result as Ran

from bdprune.fleet import ReferenceScan, references
from bdprune.fleet.references import level_detectors
from bdprune.record import Evidence
from bdprune.verdict import read_table
from bdprune.zoo.store import Truth, write_truth

Run = Callable[..., Ran]
HEAD = """
name = "tiny"
dataset = "tiny"
arch = "resnet18_cifar"
width = 4
num_classes = 3
schedules = [{epochs = 1}]
"""


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three clean and three backdoored networks, whose scans are made up."""
    (tmp_path / "tiny").mkdir()
    text, truths = HEAD, {}
    for name in ("clean-1", "clean-2", "clean-3", "bad-1", "bad-2", "bad-3"):
        kind = "sig" if name == "bad-3" else "badnets"
        attack = f'attack = {{kind = "{kind}", target = 1}}' if "bad" in name else ""
        text += f'[[models]]\nname = "{name}"\nseed = 1\n{attack}\n'
        (tmp_path / "tiny" / f"{name}.safetensors").write_text(name)
        truths[name] = Truth(name, 1 if attack else None, 0.9, 0.9 if attack else None, None, 1.0)
    write_truth(tmp_path / "tiny", truths)
    path = tmp_path / "tiny.toml"
    path.write_text(text)

    def scan_references(zoo: Any, entries: Any, rows: Any, *, budget: Any, seed: int, progress: Any) -> Iterator[Any]:
        for entry in entries:
            progress(entry, "loading")
            yield made_up(entry.name, budget, seed)

    monkeypatch.setattr("bdprune.fleet.scan_references", scan_references)
    return path


def made_up(name: str, budget: Any, seed: int) -> ReferenceScan:
    score = int(name[-1]) / 10 + 0.8 * ("bad" in name)
    evidence = tuple(
        Evidence(detector=f"bdprune.{one}", score=score, threshold=1.0, flagged=score > 1)
        for one in level_detectors(budget)
    )
    fields: Any = {"network": name, "sha256": "0", "budget": budget, "seed": seed, "arch": "resnet18_cifar"}
    return ReferenceScan(**fields, verdict="clean", accuracy=0.9, evidence=evidence)


def test_it_writes_a_table_and_prints_the_evaluation(run: Run, manifest: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    done = run("calibrate", manifest, "--data", tmp_path, "-o", table, "--budget", "fast")
    assert done.exit_code == 0, done.output
    assert "Fitted to 6 networks, 3 of them backdoored" in done.stdout and "[6/6] clean  bad-3" in done.stderr
    found = read_table(table)
    assert (found.name, found.budget, found.networks) == ("tiny", "fast", 6)


def test_the_report_goes_to_a_file(run: Run, manifest: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    report.write_text("# Kept\n")
    done = run("calibrate", manifest, "--data", tmp_path, "--report", report, "-q")
    assert done.exit_code == 0 and done.stdout == "" and done.stderr == ""
    first = report.read_text()
    assert first.startswith("# Kept\n") and "<!-- calibrate tiny default: begin -->\nFitted to 6 networks" in first
    run("calibrate", manifest, "--data", tmp_path, "--report", report, "-q")
    assert report.read_text() == first, "a second run replaces the section"


def test_errors_come_before_the_scans(run: Run, manifest: Path, tmp_path: Path) -> None:
    done = run("calibrate", manifest, "--data", tmp_path, "-o", tmp_path / "missing" / "table.json")
    assert done.exit_code != 0 and "missing" in done.stderr and "[1/6]" not in done.stderr
    done = run("calibrate", manifest, "--data", tmp_path, "-o", manifest)
    assert done.exit_code != 0 and "would be overwritten" in done.stderr
    done = run("calibrate", manifest, "--data", tmp_path, "--only", "other", "--rows", tmp_path / "rows.jsonl")
    assert done.exit_code != 0 and "has no model 'other'" in done.stderr


def test_some_networks_are_scanned_without_a_fit(run: Run, manifest: Path, tmp_path: Path) -> None:
    only = ("--data", tmp_path, "--only", "clean-1", "--rows", tmp_path / "rows.jsonl")
    done = run("calibrate", manifest, *only)
    assert done.exit_code == 0 and done.stdout == ""
    assert "needs --rows and neither" in run("calibrate", manifest, *only, "-o", tmp_path / "table.json").stderr
    assert "needs --rows and neither" in run("calibrate", manifest, *only[:4]).stderr
    (tmp_path / "tiny" / "clean-1.safetensors").unlink()
    assert "The network clean-1 is not trained." in run("calibrate", manifest, *only).stderr


def test_too_few_networks_are_an_error(run: Run, manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny" / "bad-3.safetensors").unlink()
    done = run("calibrate", manifest, "--data", tmp_path)
    assert done.exit_code != 0 and "3 clean ones and 2 backdoored ones of 1 attacks." in done.stderr


def test_a_report_that_is_no_text_is_refused_before_the_scans(run: Run, manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "report.md").write_bytes(b"\xff")
    done = run("calibrate", manifest, "--data", tmp_path, "--report", tmp_path / "report.md")
    assert done.exit_code != 0 and "as text" in done.stderr and "[1/6]" not in done.stderr


def test_rows_are_read_before_the_first_scan(run: Run, manifest: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("bdprune.fleet.scan_references", references.scan_references)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    done = run("calibrate", manifest, "--data", tmp_path, "--rows", rows)
    assert done.exit_code != 0 and "Cannot read the scans in" in done.stderr
