"""Settings and limits of a process that belongs to bdprune: the command line, and the processes that it starts."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of glibc's mallopt
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def keep_freed_memory() -> bool:
    """Makes this process keep the memory that it frees, for later tensors.

    By default glibc returns every large block to the system. Each new tensor then consists of pages that the system
    must first clear, which takes long for large feature maps. The setting
    affects the whole process, so only programs should make it, not libraries.

    Returns:
        Whether it was possible: on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory() -> None:
    """Returns freed memory to the system, also where :func:`keep_freed_memory` keeps it; only with glibc."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def end_with_parent(parent: int, *, by_kernel: bool) -> None:
    """Makes this process end as soon as its parent is gone, even if the parent was killed.

    Args:
        parent: process id of the parent.
        by_kernel: also ask the kernel, which ends the process when the thread that started it ends. So it is only
            right for a process that the main thread started. Without it, a thread of this process looks once a second;
            it gets no turn while native code keeps Python's lock.
    """
    if by_kernel and sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), name="bdprune-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def resident_bytes(process: int) -> int:
    """The memory that a process has in RAM; 0 if the process is gone or the system does not say."""
    try:
        with open(f"/proc/{process}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def usable_cores() -> int:
    """How many cores this process may use: its affinity, and the CPU limit of its control group."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    return max(1, min([cores, *_quotas(_GROUPS)]))


def _quotas(root: Path) -> Iterator[int]:
    """The limits of the control group (version 2) of this process and of its parents, in cores, rounded up."""
    try:
        own = next(line[3:] for line in _OWN_GROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return
    folder = root / own.strip("/")
    for one in (folder, *folder.parents):
        with contextlib.suppress(OSError, ValueError):
            limit, period = (one / "cpu.max").read_text().split()
            if limit != "max":
                yield math.ceil(int(limit) / int(period))
        if one == root:
            return
