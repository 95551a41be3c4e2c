"""Writers turn documents into a report: one for each module of ``writers``, and plug-ins from entry points."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

from bdprune.errors import OptionError, first_line
from bdprune.record import KINDS, CoverageResult, Document, ScreenResult
from bdprune.registry import load, places

Documents = Sequence[Document | ScreenResult | CoverageResult]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Style:
    """How to write.

    Args:
        as_array: write an array even for one document or none.
        colour: use terminal colours.
        several: the document is one of several in a stream.
    """

    as_array: bool = False
    colour: bool = False
    several: bool = False


@dataclass(frozen=True)
class Writer(ABC):
    """Base of the writers. A subclass describes its format and writes documents as text.

    Args:
        name: of the format: the name of the writer's module, or of its entry point in the group ``bdprune.writers``.

    Attributes:
        title: what the format is for, in a few words.
        media_type: of the text.
        suffixes: file suffixes that select this format by default.
        kinds: the kinds of documents that the format can hold.
        streams: whether the text of several documents is their texts, with ``separator`` between them, and then what
            :meth:`ending` gives. If so, each document goes to standard output as soon as it is ready.
        separator: text between two documents of a stream.
    """

    name: str

    title: ClassVar[str]
    media_type: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[tuple[str, ...]] = tuple(KINDS)
    streams: ClassVar[bool] = False
    separator: ClassVar[str] = ""

    @abstractmethod
    def to_text(self, documents: Documents, style: Style) -> str:
        """The text of ``documents``, which have the kinds in ``kinds``; a coverage comes last."""

    def ending(self, documents: Documents, style: Style) -> str:
        """What follows the documents of a stream: by default only the coverage.

        Args:
            documents: the brief forms of those of the stream, and then perhaps a coverage.
            style: that of the documents.
        """
        return self.to_text([one for one in documents if isinstance(one, CoverageResult)], style)

    def render(self, documents: Documents, style: Style | None = None) -> str:
        """The text of ``documents``.

        Raises:
            OptionError: the format cannot hold one of the documents.
        """
        self.check(dict.fromkeys(map(kind_of, documents)))
        return self.to_text(documents, style or Style())

    def check(self, kinds: Sequence[str] | dict[str, None]) -> None:
        """Checks that the format can hold documents of these kinds.

        Raises:
            OptionError: it cannot hold one of them.
        """
        refused = [kind for kind in kinds if kind not in self.kinds]
        if refused:
            others = [one for one in names(*kinds) if one != self.name]
            raise OptionError(
                f"The format {self.name} cannot hold results of the kind {' or '.join(refused)}.",
                f"Use another: {', '.join(others)}.",
            )


def kind_of(document: Document | ScreenResult | CoverageResult) -> str:
    """The kind of a document: a key of ``KINDS``."""
    return next(name for name, record in KINDS.items() if isinstance(document, record))


def names(*kinds: str) -> list[str]:
    """The names of all formats that can hold documents of these kinds, bdprune's own first."""
    return [one.name for one in _usable(kinds)]


def writer(name: str, *kinds: str) -> Writer:
    """The writer of a format.

    Args:
        name: of the format.
        kinds: kinds of the documents to write.

    Raises:
        OptionError: the format is unknown, cannot hold such documents, or cannot be loaded.
    """
    if name not in _places():
        known = names(*kinds)
        raise OptionError(f"There is no format {name!r}.", f"Give one of {', '.join(known)}, or {known[0]}=FILE.")
    found = _load(name)
    found.check(kinds)
    return found


def writer_of_file(path: Path, *kinds: str) -> Writer:
    """The writer whose format has the suffix of ``path``.

    Raises:
        OptionError: no such format can hold documents of these kinds.
    """
    usable = _usable(kinds)
    for one in usable:
        if path.suffix.lower() in one.suffixes:
            return one
    known = "|".join(one.name for one in usable)
    raise OptionError(f"The suffix of {str(path)!r} names no format.", f"Give --format {known} for each file.")


def _usable(kinds: Sequence[str]) -> list[Writer]:
    """The writers that can hold documents of these kinds; it skips plug-ins that fail."""
    found = []
    for name in _places():
        try:
            found.append(_load(name))
        except OptionError as error:
            log.warning("%s", error.message)
    return [one for one in found if set(kinds) <= set(one.kinds)]


def _load(name: str) -> Writer:
    try:
        found = load(_places()[name], lambda one: issubclass(one, Writer))
        if not (inspect.isclass(found) and issubclass(found, Writer)):
            raise TypeError(f"{found!r} is not a subclass of bdprune.report.Writer.")
        return found(name)
    except Exception as error:  # a plug-in may fail in any way
        raise OptionError(
            f"The format {name!r} cannot be loaded: {first_line(error)}",
            "Repair or remove the package that provides it.",
        ) from error


@cache
def _places() -> dict[str, EntryPoint | str]:
    """The place of every writer, by name. A process searches the installed packages once."""
    return places("bdprune.report.writers", "bdprune.writers")
