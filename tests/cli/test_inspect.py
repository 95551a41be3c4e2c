"""``bdprune inspect``: formats, exit codes, and progress."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import Result as Ran

from bdprune.cli import exit_codes
from bdprune.cli import inspect as command
from bdprune.record import InspectResult

Run = Callable[..., Ran]


@pytest.fixture
def args(tiny: Any, model_args: list[str]) -> list[object]:
    return ["inspect", tiny.path, *model_args, "--data", tiny.data, "--overlays", "20", "--frr", "0.1"]


@pytest.fixture
def incoming(tiny: Any) -> Path:
    """Three images of the task, and one of one colour, whose label no overlay changes."""
    images = np.load(tiny.data)["images"][[0, 30, 60, 0]]
    images[3] = (255, 0, 0)
    np.savez(tiny.folder / "incoming.npz", images=images)
    return tiny.folder / "incoming.npz"


def test_text_shows_the_count_the_threshold_and_the_lowest_entropies(
    run: Run, args: list[object], incoming: Path
) -> None:
    done = run(*args, "--images", incoming)
    assert done.exit_code == 1, done.output
    assert done.stdout.startswith("SUSPICIOUS  ") and "1 of 4 images is suspicious." in done.stdout
    assert "STRIP, 20 overlays, false rejection rate 0.1" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    start = next(place for place, line in enumerate(lines) if line[:2] == ["verdict", "entropy"])
    assert lines[start + 1][0] == "suspicious" and lines[start + 1][-3:] == ["3", "of", str(incoming)]
    assert [line[0] for line in lines[start + 2 : start + 5]] == ["normal"] * 3


def test_json_lines_and_html_hold_the_same_result(run: Run, args: list[object], incoming: Path, tmp_path: Path) -> None:
    page, lines = tmp_path / "r.html", tmp_path / "r.jsonl"
    done = run(
        *args, "--images", incoming, "-f", "json", "-f", f"html={page}", "-f", f"jsonl={lines}", "--pictures", "2"
    )
    found = InspectResult.from_json(done.stdout)
    assert json.loads(done.stdout)["kind"] == "inspect"
    assert InspectResult.from_json(lines.read_text()) == found
    assert found.suspicious == 1 and found.images[3].verdict == "suspicious" and found.frr == 0.1
    assert page.read_text().count("data:image/png;base64,") == 2


def test_images_that_cannot_be_judged_are_exit_code_5(
    run: Run, tiny: Any, model_args: list[str], incoming: Path
) -> None:
    done = run("inspect", tiny.path, *model_args, "--data", tiny.data, "--images", incoming)
    assert done.exit_code == 5 and done.stdout.startswith("UNKNOWN  ")
    assert "4 of 4 images could not be judged" in done.stdout and "a larger --frr" in done.stdout


def test_missing_data_and_files_have_their_exit_codes(run: Run, tiny: Any, args: list[object], tmp_path: Path) -> None:
    done = run("inspect", tiny.path, "--images", tiny.data)
    assert done.exit_code == 4 and "An inspection needs clean data." in done.stderr
    assert run("inspect", tiny.path).exit_code == 4
    assert run(*args, "--images", tmp_path / "missing").exit_code == 4
    (tmp_path / "empty").mkdir()
    done = run(*args, "--images", tmp_path / "empty")
    assert done.exit_code == 2 and "is empty" in done.stderr and "Give a folder of pictures" in done.stderr
    assert run(*args, "--images", tiny.data, "--frr", "2").exit_code == 4


def test_a_model_that_is_wrong_about_the_clean_images_judges_nothing(
    run: Run, tiny: Any, model_args: list[str]
) -> None:
    with np.load(tiny.data) as data:
        np.savez(tiny.folder / "shuffled.npz", images=data["images"], labels=np.arange(90) % 3)
    args = ["inspect", tiny.path, *model_args, "--data", tiny.folder / "shuffled.npz", "--images", tiny.data]
    done = run(*args)
    assert done.exit_code == 5 and "Clean accuracy is 33" in done.stderr and done.stdout == ""


def test_the_exit_code_follows_fail_on(run: Run, args: list[object], incoming: Path) -> None:
    done = run(*args, "--images", incoming, "-f", "json")
    found = InspectResult.from_json(done.stdout)
    few = msgspec.structs.replace(found, chance=0.4)
    many = msgspec.structs.replace(found, chance=0.001, unknown=1)
    none = msgspec.structs.replace(found, suspicious=0, verdict="normal")
    assert [exit_codes.of_inspection(few, one) for one in ("suspicious", "excess", "never")] == [1, 0, 0]
    assert [exit_codes.of_inspection(many, one) for one in ("suspicious", "excess", "never")] == [1, 1, 5]
    assert exit_codes.of_inspection(none) == 0


def test_progress_has_the_count_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shown:
        def __init__(self) -> None:
            self.lines: list[tuple[str, float]] = []

        def stage(self, text: str) -> None:
            self.lines.append((text, -1))

        def line(self, text: str, left: float) -> None:
            self.lines.append((text, left))

    shown, now = Shown(), [100.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])  # type: ignore[attr-defined]
    watch = command._Watch(shown)  # type: ignore[attr-defined, arg-type]
    for stage, done, total, when in (
        ("loading", 0, 0, 100),
        ("inspecting images", 10, 100, 102),
        *(("inspecting images", n, 100, 102 + n / 10) for n in (20, 60, 100)),
    ):
        now[0] = when
        watch(stage, done, total)
    assert shown.lines[:2] == [("loading", -1), ("inspecting images", -1)]
    assert [text for text, _ in shown.lines[2:]] == ["inspecting images: 60 of 100", "inspecting images: 100 of 100"]
    assert shown.lines[2][1] == pytest.approx(4.0) and shown.lines[3][1] == 0.0
