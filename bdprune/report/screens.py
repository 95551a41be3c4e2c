"""The texts about screens that all reports share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bdprune.record import HeadScreen, HeadStatistic, ScreenOutcome, ScreenResult, some
from bdprune.report.summary import number

STYLE: dict[ScreenOutcome, str] = {"nothing found": "inconclusive", "look closer": "suspicious", "error": "error"}
"""The verdict on a model that has the colours of an outcome. Nothing here has those of ``clean``."""

ADVICE: dict[ScreenOutcome, str] = {
    "nothing found": "This is no evidence that the model is clean: most backdoors do not show in the weights alone. "
    "Scan it with `bdprune scan` and clean images.",
    "look closer": "Clean networks rarely look like this. Scan it with `bdprune scan` and clean images.",
    "error": "Treat it as not screened.",
}
_ATTENTION: tuple[ScreenOutcome, ...] = ("look closer", "error", "nothing found")


def headline(result: ScreenResult) -> str:
    """What was found, in a sentence or more."""
    if result.error:
        return result.error.message
    return " ".join(result.reasons) or "No filter and no label stands out in the weights."


def advice(result: ScreenResult) -> str:
    """What to do now."""
    return f"{result.error.hint if result.error else ''} {ADVICE[result.outcome]}".strip()


def rank(result: ScreenResult) -> tuple[int, float]:
    """The sort key of screens: what needs attention first."""
    return _ATTENTION.index(result.outcome), -(result.peak.max_z if result.peak else 0.0)


def tally(results: Sequence[ScreenResult]) -> str:
    """``3 models: 1 look closer, 2 nothing found``."""
    counts = Counter(result.outcome for result in results)
    parts = [f"{counts[outcome]} {outcome}" for outcome in _ATTENTION if counts[outcome]]
    return f"{len(results)} model{'s' if len(results) != 1 else ''}: {', '.join(parts)}"


def peak(result: ScreenResult) -> str:
    """The filter that stands out most: ``3.38 in layer4.1.conv2[17]``; a dash without layers."""
    one = result.peak
    return "–" if one is None else f"{number(one.max_z)} in {one.layer}[{one.filter}]"


def head(one: HeadScreen) -> str:
    """The statistics of a head in a line."""
    if not one.statistics:
        return f"{one.labels} labels, too few for one to stand out"
    return f"{one.labels} labels; largest z: {', '.join(map(_statistic, one.statistics))}"


def unscreened(result: ScreenResult) -> str:
    """The weights that were not screened; empty without any."""
    return some(result.unscreened)


def _statistic(one: HeadStatistic) -> str:
    return f"{one.statistic} {number(one.z)} (label {one.label})"
