"""The models of a command: paths, lists of paths, and shards."""

from __future__ import annotations

import codecs
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

from bdprune.errors import OptionError
from bdprune.hub import Listed, bytes_text, is_hub_name, parse_name
from bdprune.report import plain


def expanded(paths: Sequence[str]) -> list[str]:
    """The paths, with ``@FILE`` replaced by the paths in that file, and ``-`` by those on standard input.

    A list has one path a line, or paths that end with NUL (``find -print0``). Empty lines are ignored.

    Raises:
        OptionError: a list cannot be read, is empty or binary, or standard input is given twice.
    """
    if list(paths).count("-") > 1:
        raise OptionError("Standard input is given twice as a list of paths.", "Give - once.")
    return [one for path in paths for one in _listed(path)]


def _listed(path: str) -> Iterator[str]:
    if not has_list([path]):
        yield path
        return
    name = "standard input" if path == "-" else path[1:]
    try:
        content = _standard_input() if path == "-" else _read(name)
    except OSError as error:
        hint = "Check the path. A file whose name starts with @ is given as ./@NAME."
        raise OptionError(f"The list of paths {name} cannot be read: {error.strerror}.", hint) from None
    found = [os.fsdecode(line) for line in _lines(content, name) if line.strip()]
    if not found:
        raise OptionError(f"The list of paths {name} is empty.", "Write one path a line.")
    yield from found


def _lines(content: bytes, name: str) -> list[bytes]:
    """The lines of a list.

    Raises:
        OptionError: it is no text that a system would take for paths.
    """
    if b"\0" not in content:
        return [line.rstrip(b"\r") for line in content.removeprefix(codecs.BOM_UTF8).split(b"\n")]
    lines = content.split(b"\0")
    # Text in UTF-16 and binary files have NUL bytes, too; single letters of them might name folders such as "/".
    letters = all(len(line) < 2 for line in lines)
    if lines[-1] or letters or any(set(line) & _CONTROL for line in lines) or content.startswith(_UTF16):
        hint = "Write one path a line, in UTF-8, or end each path with NUL as `find -print0` does."
        raise OptionError(f"{name} is no list of paths: it is binary or in UTF-16.", hint)
    return lines


_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_CONTROL = frozenset(range(32)) - frozenset(b"\t\n\r")


def _read(name: str) -> bytes:
    with open(name, "rb") as file:
        return file.read()


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise OptionError("Standard input is closed.", "Give the paths as arguments, or in a file as @FILE.")
    return sys.stdin.buffer.read()


def has_list(paths: Sequence[str]) -> bool:
    """Whether some of the paths come from a list."""
    return any(path == "-" or (path.startswith("@") and len(path) > 1) for path in paths)


def is_one_file(paths: Sequence[str]) -> bool:
    """Whether the paths name one file, so that a report of one result is no list."""
    if len(paths) > 1:
        return False
    return bool(parse_name(paths[0]).file) if is_hub_name(paths[0]) else os.path.isfile(paths[0])


def note(name: str, found: Listed) -> None:
    """Says on standard error what a repository holds, and where its files go."""
    commits = {one.commit[:12] for one in found.files}
    count = "1 checkpoint" if len(found.files) == 1 else f"{len(found.files)} checkpoints"
    where = f"; {bytes_text(found.download)} to download to {found.cache}" if found.download else "; all in the cache"
    print(plain(f"{name}: {count} at {', '.join(commits)}{where}"), file=sys.stderr)


def shard(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """``i/n`` as two numbers; a callback of click."""
    if value is None:
        return None
    parts = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value)
    if parts is None or not 1 <= int(parts[1]) <= int(parts[2]):
        raise OptionError(f"Invalid shard {value[:80]!r}.", "Give i/n with i from 1 to n, as in 2/8.")
    return int(parts[1]), int(parts[2])


def store_options(function: Any) -> Any:
    """``store``, ``resume``, ``shard`` and ``max_failures``."""
    from bdprune.cli.options import FILE, AtLeast

    for option in (
        click.option(
            "--max-failures",
            type=AtLeast(1),
            metavar="N",
            help="Begin no other file after N files failed; the report lists the files that were not scanned.  "
            "[default: never]",
        ),
        click.option(
            "--shard",
            callback=shard,
            metavar="i/n",
            help="Scan only part i of n; the hash of a file's path or name gives its part. Each machine needs its own "
            "store.",
        ),
        click.option(
            "--resume",
            is_flag=True,
            help="Go on with the --store of an earlier run, which must exist. The same command without this option "
            "goes on, too.",
        ),
        click.option(
            "--store",
            type=FILE,
            metavar="FILE.db",
            help="Keep results in this file. A result that is there is not computed again if file, clean data, "
            "settings and version are the same; with other detectors, only the missing ones run. After an "
            "interruption, run the same command again.",
        ),
    ):
        function = option(function)
    return function
