"""A small piece of HTML about one result, for a notebook: no scripts, and readable on a light or a dark page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from bdprune.record import (
    Attempt,
    InvertResult,
    PurifyResult,
    RepairCheck,
    Result,
    ScreenResult,
    TriggerInfo,
    number,
)
from bdprune.report import summary
from bdprune.report.rendering import encodable, environment

MOST_PICTURE_BYTES = 256 << 10
"""Bytes of all pictures in a fragment."""

_MOST_TRIGGERS = 8


class RepairLike(Protocol):
    """A repair, or its record."""

    @property
    def method(self) -> str:
        """Id of the purifier."""

    @property
    def change(self) -> str:
        """What happened to the weights."""

    @property
    def selection(self) -> str:
        """How the change was chosen."""

    @property
    def accuracy_before(self) -> float | None:
        """Clean accuracy before the repair."""

    @property
    def accuracy_after(self) -> float | None:
        """Clean accuracy after the repair."""

    @property
    def pruned(self) -> Mapping[str, Sequence[int]]:
        """Filter group -> indices of its pruned filters."""

    @property
    def check(self) -> RepairCheck | None:
        """The signs of a backdoor before and after the repair."""

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """The methods that were tried."""


def html_fragment(document: Result | ScreenResult | InvertResult | PurifyResult | RepairLike) -> str:
    """HTML about one result, to be put into another page; notebooks show results in this form.

    It is escaped, has no scripts, and holds the pictures of recovered triggers. The colours of text and background are
    those of the page around it.
    """
    if isinstance(document, Result):
        kind, shown = "scan", _triggers([one for seen in document.detectors for one in seen.triggers])
    elif isinstance(document, InvertResult):
        kind, shown = "inversion", _triggers(document.triggers)
    else:
        kind, shown = "screen" if isinstance(document, ScreenResult) else "repair", []
    values = {"one": document, "shown": shown, "title": getattr(document, "name", "")}
    if kind == "repair":
        values |= _of_repair(document)  # type: ignore[arg-type]
    return encodable(environment().get_template(f"fragment_{kind}.html.j2").render(values)).strip()


def _triggers(found: Sequence[TriggerInfo]) -> list[tuple[TriggerInfo, dict[str, bytes]]]:
    """The first triggers with those pictures that fit."""
    left, shown = MOST_PICTURE_BYTES, []
    for one in found[:_MOST_TRIGGERS]:
        size = sum(map(len, one.pictures.values()))
        shown.append((one, one.pictures if size <= left else {}))
        left -= size if size <= left else 0
    return shown


def _of_repair(one: RepairLike) -> dict[str, object]:
    filters = sum(map(len, one.pruned.values()))
    return {
        "outcome": _outcome(one),
        "before": number(one.accuracy_before),
        "after": number(one.accuracy_after),
        "pruned": f"{filters} filters in {len(one.pruned)} filter group{'' if len(one.pruned) == 1 else 's'}",
        "target": getattr(one, "target_label", None),
    }


def _outcome(one: RepairLike) -> str:
    if isinstance(one, PurifyResult):
        return summary.outcome(one)
    if one.check is not None and one.check.outcome != "repaired":
        return one.check.outcome
    if one.change == "nothing":
        return "unchanged"
    return "repaired" if one.check else "changed, not checked"
