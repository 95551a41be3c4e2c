"""``bdprune detectors`` and ``bdprune purifiers``: lists of the methods."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

import click
import msgspec

from bdprune.cli.options import listing
from bdprune.cli.outputs import emit
from bdprune.registry import Kind, methods
from bdprune.report import plain, table

if TYPE_CHECKING:
    from bdprune.record import MethodInfo

_COLUMNS = ("name", "needs", "cost", "gives", "presets", "what it does")
_OF_DETECTORS = ("evidence", "budget")
BY_NAME = "by name"
"""In place of the budget of a detector that a scan runs only by name."""


@click.command(short_help="List the detectors.")
@listing
def detectors(form: str) -> int:
    """List the detectors of bdprune and of installed packages, in the order in which a scan runs them.

    \b
    bdprune detectors
    bdprune detectors --format json
    """
    return _list("detector", form)


@click.command(short_help="List the purifiers.")
@listing
def purifiers(form: str) -> int:
    """List the purifiers of bdprune and of installed packages, with their presets.

    \b
    bdprune purifiers
    bdprune purifiers --format json
    """
    return _list("purifier", form)


def _list(kind: Kind, form: str) -> int:
    with redirect_stdout(sys.stderr):  # a plug-in may print
        found = methods(kind)
    emit(f"{json.dumps(msgspec.to_builtins(found), indent=2)}\n" if form == "json" else _text(found))
    return 0


def _text(found: list[MethodInfo]) -> str:
    detects = any(one.kind == "detector" for one in found)
    columns = [*_COLUMNS[:3], *(_OF_DETECTORS if detects else ()), *_COLUMNS[3:]]
    rows = [
        (
            *(one.name, needs(one), one.cost),
            *((one.sign, one.level or BY_NAME) if detects else ()),
            *(", ".join(one.gives), " ".join(one.presets) or "–", one.title),
        )
        for one in found
    ]
    lines = table([columns, *rows], "l" * len(columns))
    notes = [f"  {plain(one.name)}: {plain(one.limits)}" for one in found if one.limits]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def needs(one: MethodInfo) -> str:
    """The clean images that a method needs, in words."""
    if one.needs.images == "none":
        return "no images"
    words = f"{one.needs.minimum}+ {one.needs.images} images"
    return f"{words}, {one.needs.per_class} a class" if one.needs.per_class else words
