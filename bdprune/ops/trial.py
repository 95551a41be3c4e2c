"""Outcomes of trials in a file of their own, for what does not yet go by :mod:`bdprune.ops.tuner`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from bdprune.ops.tuner import ROUNDS, Timer, device_name, least_seconds, seconds_of

__all__ = ["ROUNDS", "Kept", "Timer", "device_name", "least_seconds", "seconds_of"]

_Outcome = TypeVar("_Outcome")


class Kept(Generic[_Outcome]):
    """Outcomes of one kind of trial in a JSON file; where no file can be kept, they last as long as the process.

    Args:
        name: of the file, in ``BDPRUNE_CACHE``, else in the user's cache directory.
        make: a dataclass, from its fields.
        is_sound: whether what was read from the file makes sense.
    """

    def __init__(self, name: str, make: Callable[..., _Outcome], is_sound: Callable[[_Outcome], bool]) -> None:
        self._name, self._make, self._is_sound = name, make, is_sound
        self._known: dict[Path, dict[str, _Outcome]] = {}

    @property
    def file(self) -> Path:
        """Where they are kept."""
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return Path(os.environ.get("BDPRUNE_CACHE") or Path(home) / "bdprune") / self._name

    @property
    def known(self) -> dict[str, _Outcome]:
        """What this process goes by, by key: the file as it found it, and what it has added since."""
        if self.file not in self._known:
            self._known[self.file] = self.read()
        return self._known[self.file]

    def forget(self) -> None:
        """Starts like another process, which goes by the file alone."""
        self._known.clear()

    def read(self) -> dict[str, _Outcome]:
        """What is kept, by key; nothing where the file is missing or not ours to understand."""
        try:
            entries = json.loads(self.file.read_text())
            found = {key: self._make(**entry) for key, entry in entries.items()}
            return {key: one for key, one in found.items() if self._is_sound(one)}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def add(self, key: str, outcome: _Outcome) -> None:
        """Keeps one more; the file is put in place in one move."""
        self.known[key] = outcome
        entries: dict[str, Any] = {name: asdict(one) for name, one in {**self.read(), key: outcome}.items()}  # type: ignore[call-overload]
        target = self.file
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".json", delete=False) as file:
                json.dump(entries, file, indent=2)
            os.replace(file.name, target)
        except OSError:
            return
