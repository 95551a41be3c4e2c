"""Where to run, from how it is written."""

from __future__ import annotations

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
