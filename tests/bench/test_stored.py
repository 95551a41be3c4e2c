"""bench/stored.py: copies that differ, and a second run that takes all from the store."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import stored
from changed import changed_copies

from bdprune.store import Screens, Store


def test_copies_are_different_files(tmp_path: Path) -> None:
    paths = changed_copies(tmp_path, 60)
    assert len({path.read_bytes() for path in paths}) == 60


def test_both_parts_measure_a_run_in_a_fresh_process(tmp_path: Path) -> None:
    folder, store = tmp_path / "models", tmp_path / "s.db"
    changed_copies(folder, 3)
    run = stored.measured("screens", folder, store)
    assert run["count"] == 3 and run["peak"] > 0 and run["seconds"] > 0
    with Store(store) as opened:
        assert len(Screens(opened).names()) == 3
    found = stored.scan_run(sorted(folder.iterdir()), str(store), "lipschitz")
    assert found["detectors"] > 0 and found["seconds"] > 0
