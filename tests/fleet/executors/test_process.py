"""Scanning with a time limit: a slow process is killed, and the next model is still scanned."""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bdprune import Case, Detector, Evidence, Needs
from bdprune.errors import OptionError
from bdprune.fleet.scans import scan, scan_many

SLOW = """
import os, time
from dataclasses import dataclass
from pathlib import Path

from bdprune.analysis import Analysis
from bdprune.methods import Detector

HERE = Path(__file__).parent


def bias_of(case):
    return round(float(list(case.model.network.parameters())[-1].detach()[0]), 3)


@dataclass(frozen=True)
class SlowDetector(Detector):
    id = "x.slow"
    title = "hangs or dies if a file says so"
    sign = "collapse"

    def __call__(self, case):
        with (HERE / "pids").open("a") as file:
            print(os.getpid(), file=file)
        if (HERE / "hang").exists():
            (HERE / "hang").unlink()
            time.sleep(600)
        if (HERE / "die").exists():
            (HERE / "die").unlink()
            os.kill(os.getpid(), 9)
        return self.evidence(0.1, 0.5)


@dataclass(frozen=True)
class Bias(Analysis):
    how: str

    def compute(self, case):
        return self.compute_stack([case])[0]

    def compute_stack(self, cases):
        found = [bias_of(case) for case in cases]
        with (HERE / "asked").open("a") as file:
            print(*found, file=file)
        if 0.2 in found:
            if self.how == "hang":
                time.sleep(600)
            os.kill(os.getpid(), 9)
        return found


@dataclass(frozen=True)
class StackDetector(Detector):
    how: str = "hang"

    id = "x.stack"
    title = "hangs or dies on every model whose first bias is 0.2, in a stack and alone"
    sign = "collapse"

    def steps(self, case):
        score = yield Bias(self.how)
        weights = case.attach("weights", case.model.network.state_dict())
        return self.evidence(score, 0.5, target_label=1, attachments=(weights,))
"""


@pytest.fixture
def slow(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of detectors, importable in any process, that hang or die."""
    (tiny.folder / "slowdetector.py").write_text(SLOW)
    monkeypatch.delitem(sys.modules, "slowdetector", raising=False)
    return importlib.import_module("slowdetector")


def pids(tiny: Any) -> list[int]:
    return [int(line) for line in (tiny.folder / "pids").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_scan_that_hangs_is_killed_and_the_next_model_is_scanned(tiny: Any, slow: Any) -> None:
    (tiny.folder / "hang").touch()
    stages: list[str] = []
    start = time.monotonic()
    results = list(
        scan_many(
            [tiny.path, tiny.path, tiny.path],
            tiny.data,
            arch=tiny.arch,
            input_shape=tiny.input_shape,
            detectors=[slow.SlowDetector()],
            timeout=15,
            progress=stages.append,
        )
    )
    assert time.monotonic() - start < 300
    assert [one.verdict for one in results] == ["error", "inconclusive", "inconclusive"]
    error = results[0].error
    assert error and error.type == "TimeLimitError" and error.message == "Timed out after 15 seconds."
    assert results[0].seconds >= 15
    first, second, third = pids(tiny)
    assert first != second == third != os.getpid()
    assert not any(map(is_alive, (first, second)))
    assert stages.count("loading") == 3


def test_a_scan_whose_process_dies_is_an_error_and_the_next_model_is_scanned(tiny: Any, slow: Any) -> None:
    (tiny.folder / "die").touch()
    options = {"arch": tiny.arch, "input_shape": tiny.input_shape, "detectors": [slow.SlowDetector()], "timeout": 120}
    results = list(scan_many([tiny.path, tiny.path], tiny.data, **options))
    assert [one.verdict for one in results] == ["error", "inconclusive"]
    assert results[0].error and "killed by SIGKILL" in results[0].error.message


def test_the_result_equals_a_scan_without_a_limit(tiny: Any, slow: Any, tmp_path: Path) -> None:
    options = {"arch": tiny.arch, "input_shape": tiny.input_shape, "detectors": [slow.SlowDetector()], "seed": 3}
    near, far = scan(tiny.path, tiny.data, **options), scan(tiny.path, tiny.data, timeout=120, **options)
    assert (far.verdict, far.data, far.env, far.artifact) == (near.verdict, near.data, near.env, near.artifact)
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"nonsense")
    broken = scan(bad, tiny.data, timeout=120, detectors=[slow.SlowDetector()])
    assert broken.error == scan(bad, tiny.data, detectors=[slow.SlowDetector()]).error
    with pytest.raises(OptionError, match="Cannot import"):
        scan(tiny.path, tiny.data, arch="tinynet:Missing", detectors=[slow.SlowDetector()], timeout=120)


class Secretive(Detector):
    """A detector that cannot be sent to another process."""

    id = "x.secretive"
    title = "keeps a function"
    needs = Needs(images="none", minimum=0)

    def __init__(self) -> None:
        self.secret = lambda: None

    def __call__(self, case: Case) -> Evidence:
        return self.evidence(0.0, 1.0, params={})


def test_objects_that_cannot_be_sent_are_errors_before_anything_starts(tiny: Any) -> None:
    class Local(torch.nn.Module):
        pass

    with pytest.raises(OptionError, match="This model cannot be sent to another process"):
        scan(Local(), None, input_shape=(3, 8, 8), timeout=15, detectors=[])
    with pytest.raises(OptionError, match="These detectors or data cannot be sent"):
        scan(tiny.path, None, timeout=15, detectors=[Secretive()])


@pytest.mark.parametrize("how", ["hang", "die"])
def test_a_model_that_hangs_or_dies_in_a_stack_does_not_affect_the_others(tiny: Any, slow: Any, how: str) -> None:
    """The stack fails, then each of its models runs alone: one error, two verdicts."""
    files = []
    for index, bias in enumerate((0.1, 0.2, 0.6, 0.3)):
        files.append(tiny.folder / f"model{index}.pth")
        torch.save(tiny.module.state_dict() | {"head.bias": torch.tensor([bias, 0.0, 0.0])}, files[-1])
    results = list(
        scan_many(
            files,
            tiny.data,
            arch=tiny.arch,
            input_shape=tiny.input_shape,
            detectors=[slow.StackDetector(how)],
            stack=3,
            timeout=8 if how == "hang" else 120,
            attachments=tiny.folder / "attached",
        )
    )
    assert [one.verdict for one in results] == ["inconclusive", "error", "suspicious", "inconclusive"]
    error = results[1].error
    assert error and error.type == ("TimeLimitError" if how == "hang" else "ArtifactError")
    assert [Path(one.name).name for one in results] == [f"model{index}.pth" for index in range(4)]
    asked = (tiny.folder / "asked").read_text().splitlines()
    assert asked == ["0.1 0.2 0.6", "0.1", "0.2", "0.6", "0.3"]
    for one in (results[0], results[2], results[3]):
        (attached,) = one.detectors[0].attachments
        assert (tiny.folder / "attached" / attached.file).stat().st_size == attached.bytes


def test_a_stack_within_its_time_limit_runs_as_one(tiny: Any, slow: Any) -> None:
    files = []
    for index in range(5):
        files.append(tiny.folder / f"model{index}.pth")
        torch.save(tiny.module.state_dict() | {"head.bias": torch.tensor([0.3 + index / 100, 0.0, 0.0])}, files[-1])
    options = {"arch": tiny.arch, "input_shape": tiny.input_shape, "detectors": [slow.StackDetector()], "stack": 3}
    stages: list[str] = []
    far = list(scan_many(files, tiny.data, timeout=120, progress=stages.append, **options))
    asked = (tiny.folder / "asked").read_text().splitlines()
    assert asked == ["0.3 0.31 0.32", "0.33 0.34"]
    assert [one.detectors[0].details["stack"] for one in far] == [3, 3, 3, 2, 2]
    assert "running detector x.stack on 3 models" in stages and stages.count("loading") == 5
    near = list(scan_many(files, tiny.data, **options))
    assert [one.detectors[0].score for one in near] == [one.detectors[0].score for one in far]
