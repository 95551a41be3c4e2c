"""``bdprune zoo``: what is said of the models of a manifest. Making them is tested in ``tests/zoo``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result as Ran

from bdprune.zoo.manifest import read_manifest
from bdprune.zoo.store import Truth, write_truth

Run = Callable[..., Ran]
ROOT = Path(__file__).resolve().parent.parent.parent
TRUTH = {
    "badnets": Truth("badnets", 3, 0.931, 0.998, 0.01, 754.0),
    "clean": Truth("clean", None, 0.934, None, None, 751.0),
}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """The shipped manifest in a folder where badnets and clean are measured, and only badnets is still there."""
    path = tmp_path / "manifest.toml"
    path.write_text((ROOT / "zoo" / "demo" / "manifest.toml").read_text())
    write_truth(tmp_path, TRUTH)
    (tmp_path / "badnets.safetensors").touch()
    return path


def test_list_says_what_is_made_and_measured(run: Run, manifest: Path) -> None:
    done = run("zoo", "list", "--manifest", manifest)
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in done.stdout.splitlines()}
    assert set(rows) == {"model", *(entry.name for entry in read_manifest(manifest).models)}
    assert rows["badnets"] == "made 3 93.1 % 99.8 % 12 min 34 s"
    assert rows["clean"] == "not made – 93.4 % – 12 min 31 s"


def test_list_as_json(run: Run, manifest: Path) -> None:
    found = {
        one["name"]: one for one in json.loads(run("zoo", "list", "--manifest", manifest, "--format", "json").stdout)
    }
    assert found["badnets"]["truth"]["target_label"] == 3 and found["badnets"]["attack"]["kind"] == "badnets"
    assert found["clean"]["attack"] is None


def test_make_passes_on_what_was_asked_and_tells_progress(
    run: Run, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def make(manifest: Path, data: Path, out: Path, only: Any = (), progress: Any = None) -> list[Truth]:
        asked.append((manifest, data, out, only, progress is not None))
        if progress:
            for step in (1, 50, 100):
                progress("badnets\x1b", step, 100, 0.5)
        return [TRUTH["badnets"]]

    monkeypatch.setattr("bdprune.zoo.make.make", make)
    args = ["--manifest", manifest, "--data", tmp_path, "-o", tmp_path / "out", "--only", "badnets"]
    done = run("zoo", "make", *args)
    assert done.exit_code == 0 and "99.8 %" in done.stdout
    assert "step 50 of 100, loss 0.500" in done.stderr and "step 1 of" not in done.stderr and "\x1b" not in done.stderr
    assert run("zoo", "make", *args, "-q").stderr == ""
    assert asked == [(manifest, tmp_path, tmp_path / "out", ("badnets",), told) for told in (True, False)]


def test_missing_or_broken_manifest_is_exit_4(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("name = ")
    for path in (tmp_path / "missing.toml", tmp_path / "broken.toml"):
        done = run("zoo", "list", "--manifest", path)
        assert done.exit_code == 4 and done.stdout == ""
