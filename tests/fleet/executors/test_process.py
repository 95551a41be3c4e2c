"""Scanning with a time limit: in a process that is really killed, and the next model still gets scanned."""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bdprune.errors import OptionError
from bdprune.fleet.scans import scan, scan_many

SLOW = """
import os, time
from pathlib import Path
from bdprune.methods.base import Evidence

HERE = Path(__file__).parent

class Detector:
    id = "bdprune.unlearning"
    needs_data = True

    def __call__(self, model, data):
        with (HERE / "pids").open("a") as file:
            print(os.getpid(), file=file)
        if (HERE / "hang").exists():
            (HERE / "hang").unlink()
            time.sleep(600)
        if (HERE / "die").exists():
            (HERE / "die").unlink()
            os.kill(os.getpid(), 9)
        return Evidence(self.id, 0.1, 0.5, False)
"""


@pytest.fixture
def slow(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A detector, importable in any process, that hangs or dies once where it is told to by a file."""
    (tiny.folder / "slowdetector.py").write_text(SLOW)
    monkeypatch.delitem(sys.modules, "slowdetector", raising=False)
    return importlib.import_module("slowdetector").Detector()


def pids(tiny: Any) -> list[int]:
    return [int(line) for line in (tiny.folder / "pids").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_that_hangs_is_killed_and_the_next_is_scanned(tiny: Any, slow: Any) -> None:
    (tiny.folder / "hang").touch()
    stages: list[str] = []
    start = time.monotonic()
    results = list(
        scan_many(
            [tiny.path, tiny.path, tiny.path],
            tiny.data,
            arch=tiny.arch,
            input_shape=tiny.input_shape,
            detectors=[slow],
            timeout=25,
            progress=stages.append,
        )
    )
    assert time.monotonic() - start < 300
    assert [one.verdict for one in results] == ["error", "clean", "clean"]
    error = results[0].error
    assert error and error.type == "TimeLimitError" and error.message == "Timed out after 25 seconds."
    assert results[0].seconds >= 25
    first, second, third = pids(tiny)
    assert first != second == third != os.getpid()
    assert not any(map(is_alive, (first, second)))
    assert stages.count("loading") == 3


def test_one_whose_process_dies_is_an_error_and_the_next_is_scanned(tiny: Any, slow: Any) -> None:
    (tiny.folder / "die").touch()
    options = {"arch": tiny.arch, "input_shape": tiny.input_shape, "detectors": [slow], "timeout": 120}
    results = list(scan_many([tiny.path, tiny.path], tiny.data, **options))
    assert [one.verdict for one in results] == ["error", "clean"]
    assert results[0].error and "killed by SIGKILL" in results[0].error.message


def test_result_is_that_of_a_scan_without_a_limit(tiny: Any, slow: Any, tmp_path: Path) -> None:
    options = {"arch": tiny.arch, "input_shape": tiny.input_shape, "detectors": [slow], "seed": 3}
    near, far = scan(tiny.path, tiny.data, **options), scan(tiny.path, tiny.data, timeout=120, **options)
    assert (far.verdict, far.data, far.env, far.artifact) == (near.verdict, near.data, near.env, near.artifact)
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"nonsense")
    broken = scan(bad, tiny.data, timeout=120, detectors=[slow])
    assert broken.error == scan(bad, tiny.data, detectors=[slow]).error
    with pytest.raises(OptionError, match="Cannot import"):
        scan(tiny.path, tiny.data, arch="tinynet:Missing", detectors=[slow], timeout=120)


def test_what_cannot_be_sent_is_refused_before_anything_starts(tiny: Any) -> None:
    class Local(torch.nn.Module):
        pass

    with pytest.raises(OptionError, match="This model cannot be sent to another process"):
        scan(Local(), None, input_shape=(3, 8, 8), timeout=10, detectors=[])
    with pytest.raises(OptionError, match="These detectors or data cannot be sent"):
        scan(tiny.path, None, timeout=10, detectors=[lambda model, data: None])  # type: ignore[list-item]
