"""Scanning in other processes: time limits, stacks, and several models at a time."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bdprune
from bdprune import Case, Detector, Evidence, Needs
from bdprune.errors import OptionError
from bdprune.fleet.executors import process
from bdprune.fleet.executors.inline import InlineExecutor, Limits
from bdprune.fleet.executors.process import ProcessExecutor
from bdprune.fleet.scans import Scanner, scan, scan_many
from bdprune.model import build
from bdprune.pipeline import CleanSource, Job, Options
from bdprune.process import usable_cores
from bdprune.store import Store

from .helpers import Odd, becomes_true, is_alive, without_times

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
            timeout=20 if how == "hang" else 120,
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


# ---------------------------------------------------------------------------------------------- several processes


def test_two_processes_give_the_results_of_this_one_in_order(odd: Odd, one_thread: None) -> None:
    """The first model waits until the others are done."""
    files = odd.files(0.1, 0.11, 0.6, 0.15, 0.7, 0.12)
    (odd.folder / "hold").write_text("0.1")

    def ends() -> list[float]:
        return [bias for what, bias, _, _ in odd.notes() if what == "end"]

    def release() -> None:
        becomes_true(lambda: len(ends()) == 5, 120)
        (odd.folder / "hold").unlink()

    waiting = threading.Thread(target=release)
    waiting.start()
    two = list(scan_many(files, workers=2, **odd.options))
    waiting.join()
    assert ends()[-1] == 0.1 and len(odd.processes()) == 2
    assert without_times(two) == without_times(list(scan_many(files, **odd.options)))


def test_a_store_gets_the_same_from_two_processes(odd: Odd, one_thread: None) -> None:
    files = odd.files(0.1, 0.6, 0.15, 0.7)
    files[1].write_bytes(b"nonsense")
    exports = []
    for name, workers in (("one.db", None), ("two.db", 2)):
        with Scanner(workers=workers, store=odd.folder / name, **odd.options) as scanner:
            list(scanner.scan_many(files))
        with Store(odd.folder / name) as store:
            found = [scan for scan in store.scans()]
            exports.append([(one.name, one.model, one.settings, without_times(one.results)) for one in found])
    assert len(exports[0]) == 4 and exports[0] == exports[1]


def test_a_store_keeps_results_that_wait_for_an_earlier_model(odd: Odd) -> None:
    """Only the models at hand are lost when a run is killed, also if one of them takes long."""
    files = odd.files(0.2, 0.1, 0.6)
    with Scanner(workers=2, timeout=15, store=odd.folder / "scans.db", **odd.options) as scanner:
        stream = scanner.scan_many(files)
        thread = threading.Thread(target=lambda: next(stream))
        thread.start()
        with Store(odd.folder / "scans.db", writes=False) as store:
            assert becomes_true(lambda: store.names() == [str(file) for file in files[1:]], 60)
        assert thread.is_alive(), "the first model still runs"
        thread.join()
        assert [one.verdict for one in stream] == ["inconclusive", "suspicious"]


def test_models_in_the_store_do_not_delay_those_that_run(odd: Odd) -> None:
    """The first model is done and stored while the run still looks for the next one that is not in the store."""
    first, last, *known = odd.files(0.1, 0.15, 0.6, 0.7)
    with Scanner(workers=2, store=odd.folder / "scans.db", **odd.options) as scanner:
        list(scanner.scan_many(known))
        read, deadline = list[Path](), time.monotonic() + 120

        def models() -> Iterator[Path]:
            """The first model, then others until the store has it, then the last one."""
            with Store(odd.folder / "scans.db", writes=False) as store:
                yield from noted(first)
                while not store.knows(str(first)):
                    assert time.monotonic() < deadline, "the first model waits for those that are looked up"
                    time.sleep(0.05)
                    yield from noted(known[len(read) % 2])
            yield from noted(last)

        def noted(path: Path) -> Iterator[Path]:
            read.append(path)
            yield path

        found = list(scanner.scan_many(models()))
    assert [one.artifact.path for one in found if one.artifact] == list(map(str, read))


def test_processes_take_the_evidence_of_the_store(odd: Odd) -> None:
    files = odd.files(0.1, 0.6)
    options = odd.options | {"store": odd.folder / "scans.db", "arch": "resnet18_cifar", "input_shape": None}
    for index, file in enumerate(files):
        with torch.random.fork_rng():
            torch.manual_seed(index)
            torch.save(build("resnet18_cifar", 3, width=4).state_dict(), file)
    list(scan_many(files, workers=2, **options))
    before = odd.notes()
    found = list(
        scan_many(
            files, workers=2, **options | {"detectors": [*odd.options["detectors"], bdprune.detector("lipschitz")]}
        )
    )
    assert odd.notes() == before and [len(one.detectors) for one in found] == [2, 2]


def test_a_closed_stream_ends_all_processes(odd: Odd) -> None:
    stream = scan_many(odd.files(0.1, 0.2, 0.2), workers=2, **odd.options)
    next(stream)
    assert becomes_true(lambda: len(odd.processes()) == 2)
    assert any(map(is_alive, odd.processes()))
    stream.close()  # type: ignore[attr-defined]
    assert not any(map(is_alive, odd.processes()))


def test_results_of_an_endless_list_come_while_it_is_read(odd: Odd) -> None:
    (file,) = odd.files(0.1)
    read: list[int] = []

    def models() -> Iterator[Path]:
        while True:
            read.append(len(read))
            yield file

    stream = scan_many(models(), workers=2, **odd.options)
    for _ in range(20):
        assert next(stream).verdict == "inconclusive"
    assert len(read) < 200  # one process may be ahead of the other on a busy machine


def test_processes_share_the_cores(odd: Odd, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "usable_cores", lambda: 4)
    files = odd.files(0.1, 0.6)
    torch.set_num_threads(16)
    assert [one.env.threads for one in scan_many(files, workers=2, **odd.options)] == [2, 2]
    assert [one.env.threads for one in scan_many(files, workers=1, **odd.options)] == [16, 16]


def test_each_process_sees_one_of_several_gpus(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU here, only the assignment is checked."""
    monkeypatch.setattr(process, "parse_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)

    def seen(device: str, workers: int | str) -> list[str | None]:
        executor, job = ProcessExecutor(InlineExecutor(), workers=workers), Job(CleanSource(None), [], Options())
        job.options = Options(device=device)
        pool = process.Pool(InlineExecutor(), job, Limits(), executor._count(job))
        return [worker._gpu for worker in pool._workers]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert seen("cuda", "auto") == ["0", "1", "2"]
    assert seen("cuda", 4) == ["0", "1", "2", "0"]
    assert seen("cuda", 1) == [None]
    assert seen("cuda:1", "auto") == [None] and seen("cuda:1", 2) == [None, None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5, 6")
    assert seen("cuda", "auto") == ["4", "GPU-5", "6"]
    assert seen("cpu", "auto") == [None] * usable_cores()


def test_a_process_with_a_gpu_sees_no_other(odd: Odd) -> None:
    job = Job(CleanSource(None), odd.options["detectors"], Options(arch=odd.tiny.arch, input_shape=(3, 8, 8)))
    with process.Pool(InlineExecutor(), job, Limits(), 1) as pool:
        pool._workers[0]._gpu = "7"
        assert len(list(pool.run(odd.files(0.1)))) == 1
    assert {gpus for _, _, _, gpus in odd.notes()} == {"7"}


def test_stacks_are_spread_over_processes(tiny: Any, slow: Any) -> None:
    files = []
    for index in range(5):
        files.append(tiny.folder / f"model{index}.pth")
        torch.save(tiny.module.state_dict() | {"head.bias": torch.tensor([0.3 + index / 100, 0.0, 0.0])}, files[-1])
    options = {"arch": tiny.arch, "input_shape": tiny.input_shape, "detectors": [slow.StackDetector()], "stack": 4}
    found = list(scan_many(files, tiny.data, workers=2, **options))
    asked = (tiny.folder / "asked").read_text().splitlines()
    assert sorted(asked) == ["0.3 0.31 0.32", "0.33 0.34"], "not 4 and 1"
    assert [one.detectors[0].score for one in found] == [0.3, 0.31, 0.32, 0.33, 0.34]


def test_progress_says_how_many_models_run(odd: Odd) -> None:
    stages: list[str] = []
    list(scan_many(odd.files(0.1, 0.6, 0.7), workers=2, progress=stages.append, **odd.options))
    assert stages[0] == "running 2 models at a time"


@pytest.mark.parametrize("workers", [0, -1, 1025, 1.5, "all"])
def test_an_invalid_number_of_workers_is_an_error(workers: Any) -> None:
    with pytest.raises(OptionError, match="Invalid number of workers"):
        ProcessExecutor(InlineExecutor(), workers=workers)
