"""Rows of measurements in JSON lines files, and what several benchmarks compute from them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bdprune.errors import BdpruneError
from bdprune.files import drop_half_line

Row = dict[str, Any]


class Rows:
    """Rows in a JSON lines file. Each row is written when it is done, and never made again.

    Args:
        path: of the file; None writes no file.
        fields: names of the fields that identify a row.
        stamp: fields of every new row, such as the device.

    Attributes:
        failed: the rows that could not be made, as (key, error). They are not written, so a new run tries them again.
    """

    def __init__(self, path: Path | None, fields: Sequence[str], stamp: Row | None = None) -> None:
        self._path, self._fields = path, fields
        self._stamp = {"commit": commit()} | (stamp or {})  # of the code that runs, whatever is committed meanwhile
        self._rows: dict[tuple[Any, ...], Row] = {}
        self.failed: list[tuple[Row, BdpruneError]] = []
        if path and path.exists():
            drop_half_line(path)
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self._rows[self._key(row)] = row

    def add(self, key: Row, make: Callable[[], Row]) -> None:
        """Makes and writes the row of ``key`` if it is missing. Its details are written, but not shown."""
        if self._key(key) in self._rows:
            return
        try:
            row = key | make() | self._stamp
        except BdpruneError as error:
            self.failed.append((key, error))
            print(f"{key}: {error}", file=sys.stderr, flush=True)
            return
        self._rows[self._key(row)] = row
        short = {name: value for name, value in row.items() if name != "details"}
        print(json.dumps(short), file=sys.stderr, flush=True)
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def where(self, **values: Any) -> list[Row]:
        """The rows with these values, in their order."""
        return [row for row in self._rows.values() if all(row.get(name) == value for name, value in values.items())]

    def _key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self._fields)


def commit() -> str:
    """The short name of the commit that is checked out, with ``+`` if the code has changed since."""
    code = ("bdprune", "csrc", "bench/*.py")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return _git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], capture_output=True, text=True, check=False).stdout.strip()


def auroc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """The probability that one of ``higher`` is larger than one of ``lower``; equal values count half."""
    wins = [(one > other) + 0.5 * (one == other) for one in higher for other in lower]
    return sum(wins) / len(wins)
