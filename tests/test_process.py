"""Settings of processes: how they keep freed memory, how much they have, their cores, and their end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bdprune import process
from bdprune.process import keep_freed_memory, resident_bytes, usable_cores

PAGES = """
import resource
from bdprune import process
from bdprune.process import keep_freed_memory, resident_bytes, usable_cores
{call}
for _ in range(3):
    bytearray(1 << 26)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    bytearray(1 << 26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(call: str) -> int:
    """Pages that a new process takes from the system while it fills four arrays of 64 MB."""
    done = subprocess.run([sys.executable, "-c", PAGES.format(call=call)], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the setting exists on Linux only")
def test_later_arrays_reuse_memory() -> None:
    if not keep_freed_memory():
        pytest.skip("this C library has no such setting")
    assert pages("keep_freed_memory()") < pages("") / 10


def test_other_systems_have_no_such_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()


FILLED = """
import os
from bdprune.process import resident_bytes
before = resident_bytes(os.getpid())
filled = b"x" * (200 << 20)
print(resident_bytes(os.getpid()) - before)
"""


def test_the_memory_of_a_process_grows_with_what_it_fills() -> None:
    """In a small process: of a large one, the system may take back other pages at the same time."""
    done = subprocess.run([sys.executable, "-c", FILLED], check=True, capture_output=True, text=True)
    assert 180 << 20 < int(done.stdout) < 260 << 20
    assert resident_bytes(2**22 + 1) == 0, "there is no such process"


RETURNED = """
import ctypes, os
from bdprune.process import keep_freed_memory, resident_bytes, return_freed_memory
keep_freed_memory()
del_me = [b"x" * (1 << 20) for _ in range(100)] + [b"y"]
del del_me[:100]
kept = resident_bytes(os.getpid())
return_freed_memory()
print(kept - resident_bytes(os.getpid()))
"""


def test_kept_memory_can_be_returned() -> None:
    if not keep_freed_memory():
        pytest.skip("this C library has no such setting")
    done = subprocess.run([sys.executable, "-c", RETURNED], check=True, capture_output=True, text=True)
    assert int(done.stdout) > 90 << 20


@pytest.mark.parametrize(
    ("limits", "cores"),
    [
        ({"": "max 100000"}, 8),
        ({"": "250000 100000"}, 3),
        ({"": "400000 100000", "a": "max 100000", "a/b": "150000 100000"}, 2),
        ({"": "1000 100000"}, 1),
        ({"": "nonsense"}, 8),
        ({}, 8),
    ],
)
def test_cores_follow_the_affinity_and_the_limits_of_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, str], cores: int
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for folder, text in limits.items():
        (tmp_path / folder / "cpu.max").write_text(text)
    (tmp_path / "own").write_text("4:memory:/elsewhere\n0::/a/b\n")
    monkeypatch.setattr(process, "_GROUPS", tmp_path)
    monkeypatch.setattr(process, "_OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert usable_cores() == cores
    (tmp_path / "own").unlink()
    assert usable_cores() == 8
