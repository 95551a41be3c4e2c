"""How a process keeps the memory that it frees."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bdprune.process import keep_freed_memory

PAGES = """
import resource
from bdprune.process import keep_freed_memory
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
