"""Whether a stack is done, learned without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

_PAUSE = 1e-4  # seconds


class Mark(Protocol):
    """A place in the device's work, such as a CUDA event."""

    def query(self) -> bool:
        """Whether the device has come past it."""
        ...


class Watch:
    """For a device that is done with what it was told as soon as it was told, which a CPU is."""

    def is_over(self, going: Tensor) -> bool:
        """Whether nobody is ``going`` (bool ``[G]``) any more; to be asked once an epoch."""
        return not bool(going.any())


class LateWatch:
    """For a device that works behind the host: says of an epoch what is known of the one before.

    Whether somebody is still going is copied to the host while both work on. The host is held back only where it is
    more than an epoch ahead: the device then has an epoch to do still, and is not kept waiting.

    Args:
        flags: two bools on the CPU, pinned for a GPU.
        mark: puts a mark behind all work that the device was given so far.
    """

    def __init__(self, flags: Tensor, mark: Callable[[], Mark]) -> None:
        self._now, self._before = flags
        self._mark = mark
        self._last: Mark | None = None

    def is_over(self, going: Tensor) -> bool:
        """Whether nobody was ``going`` (bool ``[G]``) when this was asked before; False the first time."""
        self._now, self._before = self._before, self._now
        last, self._last = self._last, self._send(going)
        if last is None:
            return False
        while not last.query():
            time.sleep(_PAUSE)
        return not bool(self._before)

    def _send(self, going: Tensor) -> Mark:
        self._now.copy_(going.any(), non_blocking=True)
        return self._mark()


def watch_on(device: torch.device) -> Watch | LateWatch:
    """The watch for models on ``device``."""
    if device.type != "cuda":
        return Watch()
    flags = torch.empty(2, dtype=torch.bool, pin_memory=True)
    return LateWatch(flags, lambda: torch.cuda.current_stream(device).record_event())
