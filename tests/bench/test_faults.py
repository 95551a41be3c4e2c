"""The script that breaks fleet scans: a short run of every part, and that its checks find what is wrong."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import faults
from changed import changed_copies

from bdprune.record import ArtifactInfo, Result
from bdprune.store import ScanKey, Store

from ..store.conftest import ENV

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_is_lost_doubled_left_over_or_wrong() -> None:
    command = [sys.executable, ROOT / "bench" / "faults.py", "--processes", "0", "--ray", "0", "--seed", "1"]
    small = ["--inline", "6", "--flips", "40", "--rounds", "1", "--models", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *small], env=environment, capture_output=True, text=True)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows) == 7 and {row[2] for row in rows} == {"nothing"}, rows
    assert rows[0][1].startswith("kills: 6,")


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str, list[float]], Path]:
    """Makes a store with results of these risks."""

    def call(name: str, risks: list[float]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        with Store(folder / "scans.db") as store:
            for number, risk in enumerate(risks):
                store.save(ScanKey(f"{number}", "", {}, "1"), f"{number}.pth", [result(f"{number}.pth", risk)])
        return folder / "scans.db"

    return call


def result(path: str, risk: float) -> Result:
    return Result(
        started="2026-01-01T00:00:00+00:00",
        seconds=random.random(),
        artifact=ArtifactInfo(path=path),
        model=None,
        data=None,
        env=ENV,
        verdict="inconclusive",
        risk=risk,
        target_label=None,
    )


def wrong(db: Path, whole: Path, check: Callable[[faults.Part, faults.Fleet, Path], None]) -> list[str]:
    part = faults.Part("x")
    check(part, faults.Fleet(whole.parent, [], faults.kept(whole)), db)
    return part.wrong


def test_a_store_that_is_the_same_passes(make: Callable[[str, list[float]], Path]) -> None:
    whole, same = make("whole", [0.1, 0.2]), make("same", [0.1, 0.2])
    assert wrong(same, whole, faults.check_done) == wrong(same, whole, faults.check_broken) == []


def test_whatever_is_lost_doubled_changed_or_left_over_is_found(make: Callable[[str, list[float]], Path]) -> None:
    whole = make("whole", [0.1, 0.2])
    assert "results are lost or differ" in wrong(make("lost", [0.1]), whole, faults.check_done)
    assert "results are doubled or differ" in wrong(make("more", [0.1, 0.2, 0.3]), whole, faults.check_done)
    assert len(wrong(make("changed", [0.1, 0.3]), whole, faults.check_done)) == 2
    left = make("left", [0.1, 0.2])
    (left.parent / ".bdprune-1").touch()
    assert wrong(left, whole, faults.check_done) == ["files are left over: ['.bdprune-1']"]
    assert wrong(make("part", [0.1]), whole, faults.check_broken) == []
    assert wrong(make("bad", [0.3]), whole, faults.check_broken) == ["a broken scan leaves a wrong result"]


def test_a_result_under_the_digest_of_another_file_is_found(tmp_path: Path) -> None:
    part, (one, other) = faults.Part("x"), changed_copies(tmp_path / "models", 2)
    from bdprune.fleet import scan

    found = scan(one, detectors="lipschitz")
    known = {faults._sha256(one): found.model.digest if found.model else "", faults._sha256(other): "another"}
    faults._check_digest(part, faults._sha256(one), found, known)
    assert part.wrong == []
    faults._check_digest(part, faults._sha256(other), found, known)
    assert part.wrong == ["a result has the digest of another file"]
