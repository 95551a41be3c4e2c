"""Where to run, from how it is written."""

from __future__ import annotations

from pathlib import Path

import torch

from bdprune.errors import OptionError


def parse_device(text: str) -> torch.device:
    """``cpu``, ``cuda``, ``cuda:1``, or ``auto`` for a GPU where there is one.

    Raises:
        OptionError: no such device here.
    """
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise OptionError(f"{text!r} is no device.", "Give cpu, cuda, cuda:N or auto.") from None
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"bdprune does not run on {text!r}.", "Give cpu, cuda, cuda:N or auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"There is no device {text!r} here.", "Use --device cpu, or see `bdprune doctor`.")
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on ``device`` now, as far as the system tells; a gibibyte where it does not."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return 1 << 30
