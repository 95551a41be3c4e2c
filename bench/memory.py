"""The largest memory that one measurement uses."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from bdprune.process import return_freed_memory

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def start_peak(device: torch.device) -> None:
    """Forgets the peak so far, where the system can: Linux, and memory of a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return_freed_memory()
    if _RESET.exists():
        _RESET.write_text("5")  # resets VmHWM (proc(5))


def peak_mb(device: torch.device) -> int:
    """The peak since :func:`start_peak` in MiB: of tensors on a GPU, else of the whole process.

    Where the system cannot forget a peak, it is that of the process since its start.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device)) >> 20
    if _STATUS.exists():
        line = next(one for one in _STATUS.read_text().splitlines() if one.startswith("VmHWM:"))
        return int(line.split()[1]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
