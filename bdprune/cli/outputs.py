"""Where results go: which format, and to standard output or to a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdprune.errors import BdpruneError, OptionError, OutputError, first_line
from bdprune.files import check_writable, is_special, write_text
from bdprune.report import Documents, Style, Writer, writer, writer_of_file

DEFAULT = "text"


@dataclass(frozen=True)
class Output:
    """A format and its file; no file stands for standard output."""

    writer: Writer
    path: Path | None = None

    @property
    def is_live(self) -> bool:
        """Whether results go to standard output one by one, as they come."""
        return self.path is None and self.writer.streams

    def write(self, documents: Documents, *, as_array: bool = False) -> None:
        """Writes these results, as an array where the format has arrays and ``as_array`` asks for one."""
        colour = self.path is None and use_colour()
        text = self.writer.render(documents, Style(as_array=as_array, colour=colour))
        emit(text) if self.path is None else write_text(self.path, text)


def plan(formats: Sequence[str], files: Sequence[str], kinds: Sequence[str], quiet: bool) -> list[Output]:
    """What ``--format`` and ``--output`` ask for.

    A format may bring its file along (``html=report.html``); the others take the files in order; the format of a file
    too many is known by its suffix. What is left without a file, one at most, goes to standard output, and when
    nothing does, text goes there, unless ``quiet`` and there is a file.

    Args:
        kinds: of the documents that are to be written.

    Raises:
        OptionError: a format that is unknown or cannot hold such documents, or two for standard output.
        OutputError: a file that cannot be written.
    """
    waiting = list(files)
    asked = []
    for text in formats:
        name, equals, file = text.partition("=")
        found = writer(text if equals and not file else name, *kinds)
        asked.append((found, file or (waiting.pop(0) if waiting else "-")))
    asked += [(writer_of_file(Path(file), *kinds), file) for file in waiting]
    outputs = [Output(found, None if file == "-" else Path(file)) for found, file in asked]
    on_screen = [one.writer.name for one in outputs if one.path is None]
    if len(on_screen) > 1:
        raise OptionError(
            f"The formats {' and '.join(on_screen)} would both go to standard output.",
            f"Give one of them a file: {on_screen[-1]}=FILE.",
        )
    for one in outputs:
        if one.path is not None:
            check_writable(one.path)
    return outputs if on_screen or (quiet and outputs) else [Output(writer(DEFAULT, *kinds)), *outputs]


def check_apart(written: Sequence[Path | None], read: Sequence[Path | None]) -> None:
    """Makes sure that no file is written twice and that none is written that is read.

    Args:
        written: where results go; None and pipes and devices don't count.
        read: models and data.

    Raises:
        OptionError: one is.
    """
    seen = {os.path.realpath(path): f"{path} is read" for path in read if path is not None}
    for path in written:
        if path is None or is_special(path):
            continue
        place = os.path.realpath(path)
        if place in seen:
            raise OptionError(f"{seen[place]} and would be overwritten.", "Write to another file.")
        seen[place] = f"{path} is written already"


def write_all(wanted: Sequence[Output], documents: Callable[[Output], Documents], as_array: bool) -> None:
    """Writes every output; one that fails does not keep the others from being written.

    Raises:
        BdpruneError: of the first that failed; an unexpected one of a plug-in names it.
    """
    failed: list[Exception] = []
    for one in wanted:
        try:
            one.write(documents(one), as_array=as_array)
        except (ClosedPipeError, BdpruneError) as error:
            failed.append(error)
        except Exception as error:
            what = f"The writer {one.writer.name!r} broke down with {type(error).__name__}: {first_line(error)}."
            failed.append(OutputError(what, "The other outputs were written."))
    if failed:
        raise failed[0]


class ClosedPipeError(Exception):
    """Nobody reads any more what is written. (No OSError, which click would turn into exit code 1, a verdict here.)"""


def emit(text: str) -> None:
    """Puts a result on standard output, at once.

    Raises:
        ClosedPipeError: nobody reads it.
        OutputError: it cannot be written.
    """
    if sys.stdout is None:
        raise OutputError("Standard output is closed.", "Open it, or write to a file.")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What is left in its buffer would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise ClosedPipeError from None
        raise OutputError(f"Standard output cannot be written: {error.strerror}.", "Write to a file.") from None


def use_colour() -> bool:
    """Whether standard output is a terminal that wants colour."""
    return sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
