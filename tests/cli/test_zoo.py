"""``bdprune zoo``: its output about the models of a manifest. ``tests/zoo`` tests the training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result as Ran

from bdprune.cli.zoo import Ticker
from bdprune.zoo.manifest import read_manifest
from bdprune.zoo.store import Truth, write_truth

Run = Callable[..., Ran]
ROOT = Path(__file__).resolve().parent.parent.parent
TRUTH = {
    "badnets": Truth("badnets", 3, 0.931, 0.998, 0.01, 754.0),
    "clean": Truth("clean", None, 0.934, None, None, 751.0),
}
LATE = """
[[models]]
name = "late"
seed = 1
pending = true
attack = {kind = "badnets", target = "all-to-all"}
"""


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """The shipped manifest in a folder where badnets and clean were measured, but only badnets still exists."""
    path = tmp_path / "manifest.toml"
    path.write_text((ROOT / "zoo" / "demo" / "manifest.toml").read_text() + LATE)
    write_truth(tmp_path, TRUTH)
    (tmp_path / "badnets.safetensors").touch()
    (tmp_path / ".making" / "blend").mkdir(parents=True)
    return path


def test_the_list_shows_which_models_are_made_and_measured(run: Run, manifest: Path) -> None:
    done = run("zoo", "list", manifest)
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in done.stdout.splitlines()}
    assert set(rows) == {"model", *(entry.name for entry in read_manifest(manifest).models)}
    assert rows["badnets"] == "made badnets 7 10.0 % 93.1 % 99.8 % 12 min 34 s"
    assert rows["clean"] == "not kept none – – 93.4 % – 12 min 31 s"
    assert rows["blend"] == "begun blend 5 10.0 % – – –"
    assert rows["late"] == "pending badnets all-to-all 10.0 % – – –"


def test_list_as_json(run: Run, manifest: Path) -> None:
    found = {one["name"]: one for one in json.loads(run("zoo", "list", manifest, "--format", "json").stdout)}
    assert found["badnets"]["truth"]["target_label"] == 3 and found["badnets"]["attack"]["kind"] == "badnets"
    assert (found["clean"]["attack"], found["clean"]["state"]) == (None, "not kept")
    assert (found["late"]["truth"], found["late"]["state"]) == (None, "pending")
    assert found["late"]["pending"] and found["late"]["schedules"][0]["epochs"] == 14


def test_make_passes_its_options_and_shows_progress(
    run: Run, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def make(
        manifest: Path, data: Path, out: Path, only: Any, device: Any, progress: Any = None, say: Any = None
    ) -> Any:
        asked.append((manifest, data, out, only, device.type, progress is not None))
        if progress:
            say("one\x1b more")
            for step in (1, 50, 100):
                progress("badnets\x1b", step, 100, 0.5)
        return [TRUTH["badnets"], Truth("late", None, 0.9, 0.85, 0.1, None)]

    monkeypatch.setattr("bdprune.zoo.make", make)
    args = [manifest, "--data", tmp_path, "-o", tmp_path / "out", "--only", "badnets"]
    done = run("zoo", "make", *args)
    assert done.exit_code == 0 and "99.8 %" in done.stdout
    assert done.stdout.splitlines()[2].split()[:4] == ["late", "made", "badnets", "all-to-all"]
    assert done.stdout.splitlines()[2].endswith("90.0 %          85.0 %            –")
    assert "one� more" in done.stderr
    assert "step 50 of 100, loss 0.500" in done.stderr and "step 1 of" not in done.stderr and "\x1b" not in done.stderr
    assert run("zoo", "make", *args, "-q").stderr == ""
    assert asked == [(manifest, tmp_path, tmp_path / "out", ("badnets",), "cpu", shown) for shown in (True, False)]


def test_progress_shows_the_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A training run that resumed at step 30 and takes half a second per step."""
    now = 0.0
    monkeypatch.setattr("bdprune.cli.zoo.time.monotonic", lambda: now)
    ticker = Ticker()
    for step in range(30, 101):
        now = (step - 30) / 2
        ticker("a", step, 100, 0.1)
    ticker("b", 10, 100, 0.1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "a: step 30 of 100, loss 0.100"
    assert lines[1] == "a: step 40 of 100, loss 0.100, 30.0 s left"
    assert lines[-2:] == ["a: step 100 of 100, loss 0.100", "b: step 10 of 100, loss 0.100"]
    assert len(lines) == 9


def test_help_describes_every_command_in_full(run: Run) -> None:
    assert "..." not in run("zoo", "--help").stdout.partition("Commands:")[2]


def test_missing_or_broken_manifest_is_exit_4(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("name = ")
    for path in (tmp_path / "missing.toml", tmp_path / "broken.toml"):
        done = run("zoo", "list", path)
        assert done.exit_code == 4 and done.stdout == ""
