"""Rows of measurements in JSON lines files, and what several benchmarks compute from them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Rows:
    """Rows in a JSON lines file. Each row is written when it is done, and never made again.

    Args:
        path: of the file; None writes no file.
        fields: names of the fields that identify a row.
        stamp: fields of every new row, such as the device.
    """

    def __init__(self, path: Path | None, fields: Sequence[str], stamp: Row | None = None) -> None:
        self._path, self._fields, self._stamp = path, fields, stamp or {}
        self._rows: dict[tuple[Any, ...], Row] = {}
        if path and path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self._rows[self._key(row)] = row

    def add(self, key: Row, make: Callable[[], Row]) -> None:
        """Makes and writes the row of ``key`` if it is missing. Its details are written, but not shown."""
        if self._key(key) in self._rows:
            return
        row = key | make() | {"commit": commit()} | self._stamp
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
    """The short name of the commit that is checked out."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def auroc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """The probability that one of ``higher`` is larger than one of ``lower``; equal values count half."""
    wins = [(one > other) + 0.5 * (one == other) for one in higher for other in lower]
    return sum(wins) / len(wins)
