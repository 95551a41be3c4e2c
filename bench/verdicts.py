"""Rows and tables of verdicts, for all commands that scan models of known truth."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from rows import Row

from bdprune.record import Result

SCORES = {
    "trigger": "bdprune.inversion",
    "pruning": "bdprune.trigger_pruning",
    "lead": "bdprune.unlearning",
}
"""Columns of the table, and the detectors whose scores they show."""


def verdict_row(result: Result) -> Row:
    """Verdict, labels, the score of every detector that ran, and the label that each ranks first."""
    return {
        "verdict": result.verdict,
        "label": result.target_label,
        "labels": list(result.targets),
        "sources": list(result.sources),
        "risk": result.risk,
        "scores": {one.detector: one.score for one in result.detectors},
        "leaders": {one.detector: leader(one.label_scores) for one in result.detectors if one.label_scores},
        "seconds": result.seconds,
    }


def leader(scores: Iterable[float | None]) -> int:
    """The label with the largest score; labels without one come last."""
    known = [-math.inf if score is None else score for score in scores]
    return known.index(max(known))


def verdict_table(rows: Sequence[Row]) -> str:
    """A Markdown table with one line for each model. A row has ``model``, ``kind`` (None if clean) and ``truth``."""
    columns = ["model", "truth", "verdicts", "labels", *SCORES, "seconds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, mine in by(rows, "model").items():
        truth = "clean" if mine[0]["kind"] is None else "every label" if mine[0]["truth"] is None else mine[0]["truth"]
        scores = [_span(row["scores"].get(detector) for row in mine) for detector in SCORES.values()]
        seconds = statistics.median(row["seconds"] for row in mine)
        cells = [name, truth, _tally(row["verdict"] for row in mine), _tally(map(_named, mine)), *scores]
        lines.append(f"| {' | '.join(map(str, cells))} | {seconds:.0f} |")
    return "\n".join(lines)


def by(rows: Iterable[Row], what: str) -> dict[str, list[Row]]:
    """The rows of each value of ``what``, in their order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[what], []).append(row)
    return groups


def _named(row: Row) -> str:
    """The labels that a scan named."""
    return str(row["label"]) if row["label"] is not None else ",".join(map(str, row.get("labels", []))) or "none"


def _span(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    low, high = f"{min(known):.2f}", f"{max(known):.2f}"
    return low if low == high else f"{low} to {high}"


def _tally(values: Iterable[object]) -> str:
    counts = Counter(map(str, values))
    return ", ".join(f"{count} x {value}" for value, count in counts.most_common()) or "–"
