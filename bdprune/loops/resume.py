"""A checkpoint file from which an interrupted training resumes and reaches the same final weights."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdprune.files import write_atomically

_MAX_SHARE = 0.005
"""Share of time spent on writing: the pause before the next write grows with the duration of the last write."""


def _silent(text: str) -> None:
    """Ignores the message."""


class Checkpoint:
    """The state of a training in one file, which is written whole or not at all.

    Args:
        path: path of the file; its folder must exist.
        recipe: everything that determines the training and that the trainer does not see, such as the settings of the
            objective. A file of another recipe is never resumed.
        every: minimum seconds between two writes; longer if writing is slow.
        say: called with one sentence when a file is resumed and when it is rejected.

    Attributes:
        seconds: time spent on this training, including earlier runs.
    """

    def __init__(self, path: Path, recipe: str, every: float = 60.0, say: Callable[[str], None] = _silent) -> None:
        self.path = path
        self._recipe = self._key = recipe
        self._every = every
        self._say = say
        self._before = 0.0
        self._started = self._next = time.monotonic()
        self._wait(0.0)

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def due(self) -> bool:
        """Whether it is time to write the file."""
        return time.monotonic() >= self._next

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes ``state``: tensors, numbers, strings, None, and lists, tuples and dicts of them.

        Raises:
            OutputError: the file cannot be written.
        """
        began = time.monotonic()
        data = io.BytesIO()
        torch.save({"key": self._key, "seconds": self.seconds, "state": dict(state)}, data)
        write_atomically(self.path, data.getvalue())
        self._wait(time.monotonic() - began)

    def load(self, training: str = "") -> dict[str, Any] | None:
        """The last written state, or None if there is no file, or if it is damaged or of another recipe.

        Args:
            training: more data that determines the training, for this file and the files that ``save`` writes.
        """
        self._key = digest(self._recipe, training)
        if not self.path.exists():
            return None
        try:
            kept = torch.load(self.path, map_location="cpu", weights_only=True)
            key, seconds, state = kept["key"], float(kept["seconds"]), kept["state"]
        except Exception as error:  # a damaged file can raise anything; start again
            self._say(f"{self.path} cannot be read ({type(error).__name__}). Training starts again.")
            return None
        if key != self._key:
            self._say(f"{self.path} belongs to a training with other settings, data or machine. Training starts again.")
            return None
        self._before, self._started = seconds, time.monotonic()
        return state  # type: ignore[no-any-return]

    def _wait(self, cost: float) -> None:
        self._next = time.monotonic() + max(self._every, cost / _MAX_SHARE if self._every else 0.0)


def digest(*parts: object) -> str:
    """SHA-256, in hex, of tensors (type, shape, bytes), of mappings of them, and of the text of anything else."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Mapping):
            state.update(digest(*(value for item in part.items() for value in item)).encode())
        elif isinstance(part, Tensor):
            state.update(f"{part.dtype} {tuple(part.shape)}".encode())
            state.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            state.update(repr(part).encode())
        state.update(b"\0")
    return state.hexdigest()
