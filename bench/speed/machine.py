"""Describes the machine of a record: hardware, software, commit and load."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from bdprune.ops import _backend

_ROOT = Path(__file__).resolve().parents[2]


def describe(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge a figure and to measure it again."""
    return {
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "clocks": _gpu_clocks() if device.type == "cuda" else None,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": load(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
        "build": _backend.build_info(),
    }


def cpu_name() -> str:
    """The CPU model, as the kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load() -> float | None:
    """Runnable processes in the last minute. More than the busy threads means that others used the machine too."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def commit() -> str | None:
    """Short hash of the commit, with ``+`` if tracked files have changed since."""
    found = _run("git", "-C", str(_ROOT), "rev-parse", "--short", "HEAD")
    if not found:
        return None
    changed = _run("git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no", "--", "bdprune", "bench")
    return found + ("+" if changed else "")


def _gpu_clocks() -> str | None:
    query = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,driver_version"
    return _run("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
