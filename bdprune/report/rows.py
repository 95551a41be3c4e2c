"""What a table of many models says about each: a few short texts."""

from __future__ import annotations

import re
from typing import NamedTuple, get_args

from bdprune.record import ATTENTION, Evidence, Result, Severity, Verdict, number
from bdprune.report import summary
from bdprune.report.rendering import short
from bdprune.report.writers.text import plain

LONGEST = 400
"""Characters of a name; a longer one is cut in the middle."""

_LONGEST_TEXT, _LONGEST_WORD = 240, 80
_MOST_SCORES = 6
_SEVERITIES: tuple[Severity, ...] = get_args(Severity)


class Row(NamedTuple):
    """One model in a table.

    Attributes:
        verdict: of the latest scan.
        file: name of the file in the store.
        weights: the set of weights, if the file has several; else empty.
        store: name of the store.
        risk: in [0, 1], or None.
        label: the label or labels that the backdoor leads to, or a dash.
        why: the error, or the most serious finding; for a clean model the scores.
        scores: of the detectors that flag it, or else of the detector that comes nearest to its threshold.
        trigger: the first trigger of a detector that flags it; empty if there is none.
        arch: the architecture, or a dash.
        started: day of the scan, or a dash.
        seconds: wall time of the scan.
        rules: the rules of its findings, or the type of its error.
    """

    verdict: Verdict
    file: str
    weights: str
    store: str
    risk: float | None
    label: str
    why: str
    scores: str
    trigger: str
    arch: str
    started: str
    seconds: float
    rules: str

    @property
    def name(self) -> str:
        """The file, and the set of weights if there are several."""
        return f"{self.file}#{self.weights}" if self.weights else self.file

    @property
    def rank(self) -> tuple[int, float, str, str]:
        """The sort key, the most serious first."""
        return ATTENTION.index(self.verdict), -(self.risk or 0.0), self.name, self.store


def row_of(result: Result, file: str, store: str) -> Row:
    """The row of a result.

    Args:
        file: its name in the store.
        store: name of the store.
    """
    scores = scores_of(result)
    whole = result.name
    weights = whole[len(file) + 1 :] if whole.startswith(f"{file}#") else ""
    return Row(
        verdict=result.verdict,
        file=_name(file),
        weights=_name(weights),
        store=_name(store),
        risk=_rounded(result.risk, 4),
        label=_text(_label(result), _LONGEST_WORD),
        why=_text(_why(result) or scores),
        scores=_text(scores),
        trigger=_text(_trigger(result)),
        arch=_text(result.model.arch, _LONGEST_WORD) if result.model else "–",
        started=_day(result.started),
        seconds=_rounded(result.seconds, 3) or 0.0,
        rules=_text(" ".join(rules_of(result))),
    )


def rules_of(result: Result) -> list[str]:
    """The rules of its findings, or the type of its error; each once."""
    found = [one.rule_id for one in result.findings] or ([result.error.type] if result.error else [])
    return list(dict.fromkeys(found))


def scores_of(result: Result) -> str:
    """The scores above their thresholds, as in ``inversion 10 > 1.7``; else the nearest one: ``inversion 1 of 1.7``."""
    valid = [one for one in result.detectors if one.valid]
    flagged = [
        f"{_short(one)} {summary.number(one.score)} > {summary.number(one.threshold)}" for one in _flagged(valid)
    ]
    if flagged:
        return ", ".join(flagged[:_MOST_SCORES])
    nearest = max(valid, key=_share, default=None)
    if nearest is None:
        return ""
    return f"{_short(nearest)} {summary.number(nearest.score)} of {summary.number(nearest.threshold)}"


def _flagged(valid: list[Evidence]) -> list[Evidence]:
    return [one for one in valid if one.flagged]


def _share(one: Evidence) -> float:
    """The score as a share of its threshold; 0 where a share has no meaning."""
    return (one.score or 0.0) / one.threshold if one.threshold and one.threshold > 0 else 0.0


def _why(result: Result) -> str:
    if result.error:
        return result.error.message
    if result.verdict == "clean":
        return ""
    worst = max(result.findings, key=lambda one: _SEVERITIES.index(one.severity), default=None)
    return worst.message if worst else ""


def _label(result: Result) -> str:
    names = result.data.class_names if result.data else ()
    return summary.label(result) if result.target_label is not None else summary.labels(result.targets, names) or "–"


def _trigger(result: Result) -> str:
    found = next((one for seen in result.detectors if seen.flagged for one in seen.triggers), None)
    return "" if found is None else f"{found.kind}, {summary.place(found)}, {summary.flips(found)}"


def _short(one: Evidence) -> str:
    return one.detector.removeprefix("bdprune.")


def _rounded(value: float | None, digits: int) -> float | None:
    found = number(value)
    return None if found is None else float(f"{found:.{digits}g}")


def _day(started: str) -> str:
    return started[:10] if re.match(r"\d{4}-\d\d-\d\d", started, re.ASCII) else "–"


def _name(name: str) -> str:
    cut = name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-LONGEST // 2 :]}"
    return plain(cut)


def _text(text: str, limit: int = _LONGEST_TEXT) -> str:
    return plain(short(text, limit))
