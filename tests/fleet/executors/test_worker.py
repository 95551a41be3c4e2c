"""Limits of time and memory, deaths, and the end of a process with its parent."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from bdprune.errors import OptionError
from bdprune.fleet.executors import worker as module
from bdprune.fleet.executors.inline import Limits
from bdprune.fleet.scans import Scanner, scan_many

from .helpers import Odd, becomes_true, is_alive


def test_no_model_stops_the_others(odd: Odd) -> None:
    """One hangs, one eats memory, one kills its process, one file is damaged; two processes scan the rest."""
    files = odd.files(0.1, 0.2, 0.15, 0.3, 0.4, 0.6, 0.7)
    files[2].write_bytes(b"nonsense")
    found = list(scan_many(files, workers=2, timeout=12, memory_limit=1 << 30, **odd.options))
    errors = [one.error for one in found]
    assert [one.verdict for one in found] == [
        "inconclusive",
        "error",
        "error",
        "error",
        "error",
        "suspicious",
        "suspicious",
    ]
    assert [one and one.type for one in errors[:5]] == [
        None,
        "TimeLimitError",
        "UnsupportedError",
        "MemoryLimitError",
        "ArtifactError",
    ]
    hanging, eating, dead = errors[1], errors[3], errors[4]
    assert hanging and (hanging.message, hanging.hint) == (
        "Timed out after 12 seconds.",
        "Allow more with --timeout.",
    )
    assert eating and (eating.message, eating.hint) == (
        "The scanning process took more than its 1.1 GB of memory.",
        "Allow more with --memory-limit.",
    )
    assert dead and "killed by SIGKILL" in dead.message and dead.hint
    assert [one.name for one in found] == [str(file) for file in files]
    assert becomes_true(lambda: not any(map(is_alive, odd.processes())))


def test_memory_that_earlier_models_left_is_not_blamed_on_the_next(odd: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    files = odd.files(0.1, 0.6)
    with Scanner(timeout=100, memory_limit=1 << 30, **odd.options) as scanner:
        stream = scanner.scan_many(files)
        next(stream)
        monkeypatch.setattr(module, "resident_bytes", lambda pid: 900 << 20 if pid in odd.processes() else 300 << 20)
        assert next(stream).verdict == "suspicious"
    assert len(odd.processes()) == 2, "a new process has the memory that the first one kept"


def test_a_limit_below_the_needs_of_torch_ends_the_run_at_once(odd: Odd) -> None:
    with pytest.raises(OptionError, match="before its first model; the limit is") as caught:
        list(scan_many(odd.files(0.1), memory_limit=1 << 20, **odd.options))
    assert "--memory-limit" in caught.value.hint and odd.notes() == []


@pytest.mark.parametrize("memory", [0, -1])
def test_an_invalid_memory_limit_is_an_error(memory: int) -> None:
    with pytest.raises(OptionError, match=f"Invalid memory limit of {memory} bytes"):
        Limits(None, memory)


def test_a_process_that_died_between_two_models_fails_none(odd: Odd) -> None:
    files = odd.files(0.1, 0.6, 0.7)
    stream = scan_many(files, timeout=100, **odd.options)
    found = [next(stream)]
    (process,) = odd.processes()
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    found += list(stream)
    assert [one.error for one in found] == [None] * 3


PARENT = """
import sys, threading
sys.path[:0] = [{folder!r}]
import oddities
import bdprune

def main():
    options = dict(arch={arch!r}, input_shape=(3, 8, 8), detectors=[oddities.Odd()], workers=2)
    list(bdprune.scan_many({files!r}, **options))

if __name__ == "__main__":
    if {thread}:
        one = threading.Thread(target=main)
        one.start()
        one.join()
    else:
        main()
"""


@pytest.mark.parametrize("thread", [False, True])
def test_processes_end_with_a_parent_that_was_killed(odd: Odd, thread: bool) -> None:
    files = [str(one) for one in odd.files(0.2, 0.2)]
    script = odd.folder / "parent.py"
    script.write_text(PARENT.format(folder=str(odd.folder), arch=odd.tiny.arch, files=files, thread=thread))
    process = subprocess.Popen([sys.executable, str(script)])
    try:
        assert becomes_true(lambda: len(odd.processes()) == 2, 120), "both compute"
    finally:
        process.kill()
        process.wait()
    assert becomes_true(lambda: not any(map(is_alive, odd.processes())), 10)


def test_a_run_may_start_in_a_thread_that_ends(odd: Odd) -> None:
    """The kernel's signal for the end of a parent follows the thread, so such a run does without it."""
    stream = scan_many(odd.files(0.1, 0.6), timeout=100, **odd.options)
    found = []
    thread = threading.Thread(target=lambda: found.append(next(stream)))
    thread.start()
    thread.join()
    found += list(stream)
    assert [one.verdict for one in found] == ["inconclusive", "suspicious"] and len(odd.processes()) == 1


def test_a_model_that_the_process_cannot_read_is_an_error_of_this_model(
    odd: Odd, monkeypatch: pytest.MonkeyPatch
) -> None:
    (odd.folder / "unreadable.py").write_text(
        "import torch\n\ndef read():\n    raise ValueError('not here')\n\n"
        "class Strange(torch.nn.Linear):\n    def __reduce__(self):\n        return read, ()\n"
    )
    monkeypatch.delitem(sys.modules, "unreadable", raising=False)
    strange = importlib.import_module("unreadable")
    files = odd.files(0.1, 0.6)
    found = list(scan_many([files[0], strange.Strange(3, 3), files[1]], timeout=100, **odd.options))
    assert [one.verdict for one in found] == ["inconclusive", "error", "suspicious"]
    error = found[1].error
    assert error and error.message == "The model cannot be used in another process: not here."
