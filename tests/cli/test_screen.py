"""``bdprune screen``: files, folders and globs, formats, exit codes, and a stream that keeps nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result as Ran

from bdprune import screening
from bdprune.cli import exit_codes
from bdprune.record import CoverageResult, ScreenResult, documents_from_json

Run = Callable[..., Ran]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models, one of which has an outlying filter, and files that are not models."""
    path = tmp_path / "models"
    (path / "sub").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    state = {
        "conv.weight": torch.randn(64, 8, 3, 3, generator=generator),
        "fc.weight": torch.randn(10, 64, generator=generator),
    }
    torch.save(state, path / "plain.pth")
    state["conv.weight"][5] *= 50
    torch.save(state, path / "sub" / "odd.pth")
    torch.save({"last_epoch": 3, "base_lrs": [0.1]}, path / "scheduler.pt")
    (path / "notes.txt").write_text("notes")
    return path


def test_one_file_is_one_result(run: Run, folder: Path) -> None:
    done = run("screen", folder / "plain.pth")
    assert done.exit_code == 0 and done.stdout.startswith("NOTHING FOUND  ")
    assert "no evidence that the model is clean" in done.stdout and "head" in done.stdout
    done = run("screen", folder / "sub" / "odd.pth", "-f", "json")
    found = ScreenResult.from_json(done.stdout)
    assert done.exit_code == 1 and found.outcome == "look closer" and found.peak and found.peak.filter == 5
    assert found.artifact.sha256 is not None
    done = run("screen", folder / "sub" / "odd.pth", "-f", "json", "--no-digest", "--fail-on", "never")
    assert done.exit_code == 0 and ScreenResult.from_json(done.stdout).artifact.sha256 is None


def test_a_folder_lists_what_was_skipped(run: Run, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run("screen", folder, "-f", "text", "-f", f"html={page}", "--no-progress")
    assert done.exit_code == 1
    assert "LOOK CLOSER" in done.stdout and "NOTHING FOUND" not in done.stdout
    assert "2 models: 1 look closer, 1 nothing found" in done.stdout
    assert "only the state of a learning-rate scheduler" in done.stdout and "Skipped: 2 of 4 files" in done.stdout
    assert "2 models: 1 look closer, 1 nothing found" in page.read_text()
    *screens, coverage = documents_from_json(run("screen", folder / "**" / "*", "-f", "json").stdout)
    assert isinstance(coverage, CoverageResult) and coverage.files - coverage.scanned >= 2
    assert {Path(one.name).name for one in screens if isinstance(one, ScreenResult)} == {"plain.pth", "odd.pth"}


@pytest.mark.parametrize(("form", "kept"), [("jsonl", 0), ("json", 19)])
def test_only_formats_that_need_all_results_keep_them(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, form: str, kept: int
) -> None:
    one = screening.screen(folder / "plain.pth")
    references = []

    def many(paths: Iterable[Path], *, digest: bool) -> Iterator[ScreenResult]:
        for _ in paths:
            references.append(sys.getrefcount(one))
            yield one

    monkeypatch.setattr("bdprune.screening.screen_many", many)
    for number in range(21):
        (folder / f"{number}.pth").write_bytes((folder / "plain.pth").read_bytes())
    (folder / "plain.pth").unlink()
    (folder / "sub" / "odd.pth").unlink()
    (folder / "scheduler.pt").unlink()
    done = run("screen", folder, "-f", form)
    assert done.exit_code == 0 and done.stdout.count('"kind":"screen"') == 21
    assert references[-1] - references[1] == kept


def test_exit_codes(run: Run, folder: Path, tmp_path: Path) -> None:
    assert run("screen", tmp_path / "missing.pth").exit_code == 4
    assert run("screen", folder / "notes.txt").exit_code == 3
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.txt").write_text("a")
    done = run("screen", tmp_path / "only")
    assert done.exit_code == 3 and "No checkpoint in" in done.stderr
    (tmp_path / "bad.pth").write_bytes((folder / "plain.pth").read_bytes()[:999])
    assert run("screen", tmp_path / "bad.pth").exit_code == 2
    assert run("screen", tmp_path / "bad.pth", folder / "plain.pth").exit_code == 2
    assert run("screen", tmp_path / "bad.pth", folder / "sub" / "odd.pth").exit_code == 1
    assert run("screen", folder / "plain.pth", "-f", f"json={folder / 'plain.pth'}").exit_code == 4


@pytest.mark.parametrize(
    ("counts", "fail_on", "code"),
    [
        ({"look closer": 1, "error": 1}, "look-closer", exit_codes.FOUND),
        ({"look closer": 1, "error": 1}, "never", exit_codes.FAILED),
        ({"nothing found": 1, "unsupported": 1}, "look-closer", exit_codes.FAILED),
        ({"unsupported": 2}, "look-closer", exit_codes.UNSUPPORTED),
        ({"nothing found": 2}, "look-closer", exit_codes.OK),
        ({}, "look-closer", exit_codes.UNSUPPORTED),
    ],
)
def test_the_code_of_many_screens(counts: dict[str, int], fail_on: exit_codes.ScreenFailOn, code: int) -> None:
    assert exit_codes.of_screens(counts, fail_on) == code


def test_progress_goes_to_standard_error(start: Any, folder: Path) -> None:
    process = start("screen", folder, "-f", "jsonl")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1 and all(json.loads(line) for line in stdout.splitlines())
    assert "[1/3] nothing found" in stderr and "look closer" in stderr and os.fspath(folder) in stderr


def test_a_store_saves_screens_and_show_lists_them(run: Run, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.db"
    first = run("screen", folder, "--store", store, "-f", "jsonl", "--fail-on", "never")
    assert first.exit_code == 0 and "Screens from" not in first.stderr
    again = run("screen", folder, "--store", store, "-f", "jsonl", "--fail-on", "never")
    assert again.stdout == first.stdout and f"Screens from {store}: 2." in again.stderr
    listed = run("show", store).stdout
    assert "screened: look closer" in listed and "screened: nothing found" in listed and "sub/odd.pth" in listed
    shown = run("show", store, "odd.pth", "-f", "json")
    assert ScreenResult.from_json(shown.stdout).outcome == "look closer"
    refused = run("screen", folder, "--store", store, "--no-digest")
    assert refused.exit_code == 4 and "A store needs the digest of each file." in refused.stderr


def test_a_list_of_paths_is_screened(run: Run, folder: Path, tmp_path: Path) -> None:
    paths = tmp_path / "list.txt"
    paths.write_text(f"{folder / 'plain.pth'}\n{folder / 'sub' / 'odd.pth'}\n")
    done = run("screen", f"@{paths}", "-f", "jsonl")
    assert done.exit_code == 1 and len(done.stdout.splitlines()) == 2


def test_a_skipped_file_that_may_hold_weights_is_told_by_the_exit_code(run: Run, folder: Path) -> None:
    (folder / "net.onnx").write_bytes(b"\x08\x07\x12\x07pytorch" + bytes(64))
    done = run("screen", folder, "--fail-on", "never", "-q")
    assert done.exit_code == 5 and "MAY HOLD WEIGHTS" in done.stdout


def test_a_missing_file_of_a_list_is_one_error(run: Run, folder: Path) -> None:
    paths = folder.parent / "list.txt"
    paths.write_text(f"{folder / 'plain.pth'}\n{folder / 'gone.pth'}\n")
    done = run("screen", f"@{paths}", "-f", "json")
    plain, gone = documents_from_json(done.stdout)
    assert done.exit_code == 2 and isinstance(plain, ScreenResult) and isinstance(gone, ScreenResult)
    assert plain.outcome == "nothing found" and gone.error and "No such file" in gone.error.message
