"""Outputs: the format of each, and its file or standard output."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from bdprune import environment
from bdprune.errors import BdpruneError, OptionError, OutputError, first_line
from bdprune.files import GrowingFile, check_writable, is_special, write_text
from bdprune.record import CoverageResult, Result, ScreenResult
from bdprune.report import Documents, Style, Writer, writer, writer_of_file

DEFAULT = "text"
_Result = TypeVar("_Result", Result, ScreenResult)


@dataclass(frozen=True)
class Output:
    """A format and its file; None means standard output."""

    writer: Writer
    path: Path | None = None

    @property
    def is_live(self) -> bool:
        """Whether each result is written as soon as it is ready."""
        return self.writer.streams

    def write(self, documents: Documents, *, as_array: bool = False) -> None:
        """Writes these results, as an array if ``as_array`` is set and the format has arrays."""
        colour = self.path is None and use_colour()
        text = self.writer.render(documents, Style(as_array=as_array, colour=colour))
        emit(text) if self.path is None else write_text(self.path, text)


class _Live:
    """An output that gets each result at once."""

    def __init__(self, output: Output, several: bool) -> None:
        self._writer, self._started = output.writer, False
        self._style = Style(colour=output.path is None and use_colour(), several=several)
        self._file = None if output.path is None else GrowingFile(output.path)

    def take(self, result: Result | ScreenResult) -> None:
        self._write(self._writer.render([result], self._style))

    def end(self, documents: Documents) -> None:
        self._write(self._writer.ending(documents, self._style))
        if self._file is not None:
            self._file.close()

    def _write(self, text: str) -> None:
        if text:
            whole = f"{self._writer.separator if self._started else ''}{text}"
            emit(whole) if self._file is None else self._file.write(whole)
            self._started = True


class Stream(Generic[_Result]):
    """Outputs of a command with many results: some get each result at once, the others get all of them at the end.

    If all get each result at once, only the brief form of a result stays in memory.

    Args:
        wanted: the outputs.
        several: whether more than one result may come.
    """

    def __init__(self, wanted: Sequence[Output], several: bool) -> None:
        self._live = [_Live(one, several) for one in wanted if one.is_live]
        self._others = [one for one in wanted if not one.is_live]
        self._results: list[_Result] = []

    @property
    def results(self) -> Sequence[_Result]:
        """The results so far, perhaps in their brief form."""
        return self._results

    def take(self, result: _Result) -> None:
        """Writes a result to the outputs that get it at once.

        Raises:
            ClosedPipeError: the reader is gone.
            OutputError: an output cannot be written.
        """
        self._results.append(result if self._others else result.brief())
        for one in self._live:
            one.take(result)

    def end(self, coverage: CoverageResult | None, as_array: bool) -> None:
        """Writes the other outputs, and the ending of those that got each result at once.

        Raises:
            BdpruneError: an output cannot be written; the others are.
        """
        last: tuple[CoverageResult, ...] = () if coverage is None else (coverage,)
        brief: list[_Result] = [one.brief() for one in self._results]
        with contextlib.ExitStack() as ends:  # all of them happen, also after an error
            ends.callback(write_all, self._others, lambda one: (*self._results, *last), as_array)
            for live in reversed(self._live):
                ends.callback(live.end, (*brief, *last))


def plan(formats: Sequence[str], files: Sequence[str], kinds: Sequence[str], quiet: bool) -> list[Output]:
    """The outputs that ``--format`` and ``--output`` describe.

    A format may name its file (``html=report.html``); the other formats take the files in order. The suffix of an extra
    file gives its format. One format without a file goes to standard output. If none does, text goes there, unless
    ``quiet`` is set and there is a file.

    Args:
        kinds: kinds of the documents to write.

    Raises:
        OptionError: a format is unknown or cannot hold such documents, or two formats go to standard output.
        OutputError: a file cannot be written.
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


def files_of_store(store: Path | None) -> list[Path]:
    """A store, and the files that SQLite keeps beside it; none without a store."""
    return [] if store is None else [store, *(Path(f"{store}{suffix}") for suffix in ("-wal", "-shm", "-journal"))]


def check_apart(written: Sequence[Path | None], read: Sequence[Path | str | None]) -> None:
    """Checks that no file is written twice, and that no output overwrites an input or becomes an image of a folder.

    Args:
        written: output files; None, pipes and devices don't count.
        read: models and data.

    Raises:
        OptionError: an output overwrites another file of the run, or would be read as an image from now on.
    """
    folders = [path for path in read if path is not None and os.path.isdir(path)]
    seen = {os.path.realpath(path): f"{path} is read" for path in read if path is not None}
    for path in written:
        if path is None or is_special(path):
            continue
        place = os.path.realpath(path)
        if place in seen:
            raise OptionError(f"{seen[place]} and would be overwritten.", "Write to another file.")
        inside = next((one for one in folders if Path(os.path.realpath(one)) in Path(place).parents), None)
        if inside is not None and _is_image(path):
            raise OptionError(f"{path} is an image of the folder {inside}, which is read.", "Write to another file.")
        seen[place] = f"{path} is written already"


def _is_image(path: Path) -> bool:
    from bdprune.data import is_image_file  # with torch, which only commands that read images need

    return is_image_file(path)


def write_all(wanted: Sequence[Output], documents: Callable[[Output], Documents], as_array: bool) -> None:
    """Writes every output; if one fails, it still writes the others.

    Raises:
        BdpruneError: the first error; for an unexpected error of a plug-in, it names the plug-in.
    """
    failed: list[Exception] = []
    for one in wanted:
        try:
            one.write(documents(one), as_array=as_array)
        except (ClosedPipeError, BdpruneError) as error:
            failed.append(error)
        except Exception as error:
            what = f"The writer {one.writer.name!r} failed with {type(error).__name__}: {first_line(error)}."
            failed.append(OutputError(what, "The other outputs were written."))
    if failed:
        raise failed[0]


class ClosedPipeError(Exception):
    """The reader of the output is gone. (Not an OSError: click would turn it into exit code 1, a verdict here.)"""


def emit(text: str) -> None:
    """Writes a result to standard output at once.

    Raises:
        ClosedPipeError: the reader is gone.
        OutputError: the result cannot be written.
    """
    if sys.stdout is None:
        raise OutputError("Standard output is closed.", "Open it, or write to a file.")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # The rest of the buffer would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise ClosedPipeError from None
        raise OutputError(f"Standard output cannot be written: {error.strerror}.", "Write to a file.") from None


def use_colour() -> bool:
    """Whether standard output is a terminal, and NO_COLOR is not set."""
    return sys.stdout is not None and sys.stdout.isatty() and not environment.NO_COLOR.get()
