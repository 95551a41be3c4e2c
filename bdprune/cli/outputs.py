"""Where results go: which format, and to standard output or to a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdprune.errors import OptionError, OutputError
from bdprune.files import check_writable, is_special, write_text
from bdprune.record import CoverageResult, Document, PurifyResult, Result, ScoreResult

_BY_SUFFIX = {".json": "json", ".jsonl": "jsonl", ".html": "html", ".htm": "html", ".txt": "text", ".log": "text"}


@dataclass(frozen=True)
class Output:
    """One format and its file; no file stands for standard output."""

    kind: str
    path: Path | None = None


def plan(formats: Sequence[str], files: Sequence[str], kinds: Sequence[str], quiet: bool) -> list[Output]:
    """What ``--format`` and ``--output`` ask for.

    A format may bring its file along (``html=report.html``); the others take the files in order; a file too many tells
    its format by its suffix. What is left without a file, one at most, goes to standard output, and when nothing does,
    text goes there, unless ``quiet`` and there is a file.

    Raises:
        OptionError: an unknown format, or two for standard output.
        OutputError: a file that cannot be written.
    """
    named = [_split(text, kinds) for text in formats]
    waiting = list(files)
    outputs = [Output(kind, path or _next(waiting)) for kind, path in named]
    outputs += [Output(_kind_of(name, kinds), Path(name)) for name in waiting]
    outputs = [Output(one.kind) if one.path == Path("-") else one for one in outputs]
    on_screen = [one.kind for one in outputs if one.path is None]
    if len(on_screen) > 1:
        raise OptionError(
            f"The formats {' and '.join(on_screen)} would both go to standard output.",
            "Give one of them a file: html=FILE.",
        )
    for one in outputs:
        if one.path is not None:
            check_writable(one.path)
    return outputs if on_screen or (quiet and outputs) else [Output("text"), *outputs]


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


def write(
    outputs: Sequence[Output],
    documents: Sequence[Document],
    *,
    as_array: bool,
    coverage: CoverageResult | None = None,
) -> None:
    """Writes every output but JSON Lines on standard output, which are written as the results come.

    Args:
        as_array: JSON becomes an array even when there is one result.
        coverage: what became of the files that have no results; the last element of an array.
    """
    for one in outputs:
        if one.path is not None:
            write_text(one.path, render(one.kind, documents, as_array=as_array, colour=False, coverage=coverage))
        elif one.kind != "jsonl":
            emit(render(one.kind, documents, as_array=as_array, colour=use_colour(), coverage=coverage))


def render(
    kind: str,
    documents: Sequence[Document],
    *,
    as_array: bool,
    colour: bool,
    coverage: CoverageResult | None = None,
) -> str:
    """These results in one format."""
    from bdprune.report import machine

    if kind == "html":
        from bdprune.report import html_page

        return html_page(documents, coverage=coverage)
    records: list[Document | CoverageResult] = [*documents, *([coverage] if coverage is not None else [])]
    if kind == "json":
        return machine.json_array(records) if as_array else machine.json_document(documents[0])
    if kind == "jsonl":
        return "".join(map(machine.json_line, records))
    return _text(documents, colour, coverage)


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


def _text(documents: Sequence[Document], colour: bool, coverage: CoverageResult | None) -> str:
    from bdprune.report import summary, text

    passed_over = text.coverage_text(coverage) if coverage is not None else ""
    if not documents:
        return f"{passed_over}{summary.tally([])}\n"
    scans = [one for one in documents if isinstance(one, Result)]
    if len(scans) > 1:
        loud = [one for one in scans if one.verdict != "clean"]
        blocks = [text.scan_text(one, colour=colour) for one in loud]
        return "\n".join([*blocks, text.fleet_text(scans, colour=colour)]) + passed_over
    writers: dict[type[Document], Callable[..., str]] = {
        Result: text.scan_text,
        PurifyResult: text.purify_text,
        ScoreResult: text.score_text,
    }
    return "\n".join(writers[type(one)](one, colour=colour) for one in documents) + passed_over


def _split(text: str, kinds: Sequence[str]) -> tuple[str, Path | None]:
    kind, equals, name = text.partition("=")
    if kind not in kinds or (equals and not name):
        raise OptionError(
            f"There is no format {text!r}.", f"Give one of {', '.join(kinds)}, or for a file {kinds[-1]}=FILE."
        )
    return kind, Path(name) if name else None


def _next(waiting: list[str]) -> Path | None:
    return Path(waiting.pop(0)) if waiting else None


def _kind_of(name: str, kinds: Sequence[str]) -> str:
    kind = _BY_SUFFIX.get(Path(name).suffix.lower(), "")
    if kind not in kinds:
        raise OptionError(f"{name!r} does not tell its format.", f"Give --format {'|'.join(kinds)} for each file.")
    return kind
