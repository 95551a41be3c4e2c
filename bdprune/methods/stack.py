"""Runs one detector on many models of one architecture in one batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bdprune.analysis import Analysis, Case, outcome_of
from bdprune.errors import BdpruneError, BudgetError
from bdprune.methods.base import Detector, resumed
from bdprune.record import Evidence

_Outcome = Evidence | BdpruneError


def examine_stack(detector: Detector, cases: Sequence[Case]) -> list[_Outcome]:
    """The evidence of ``detector`` in each case, or the error that it would raise on that case alone.

    The models go through the steps of the detector in parallel. Equal analyses are computed in one batch
    (:meth:`bdprune.analysis.Analysis.compute_stack`), except those with a known result.

    Args:
        cases: models of one architecture, on one device, on the same clean images.
    """
    cases = [case.in_order() for case in cases]
    running = {place: detector.steps(case) for place, case in enumerate(cases)}
    found: dict[int, _Outcome] = {}
    outcomes: dict[int, Any] = dict.fromkeys(running)
    while outcomes:
        wanted: dict[int, Analysis[Any]] = {}
        for place, outcome in outcomes.items():
            answer = outcome_of(lambda place=place, outcome=outcome: resumed(running[place], outcome))  # type: ignore[misc]
            if isinstance(answer, Analysis):
                wanted[place] = answer
            else:
                found[place] = answer
        outcomes = _computed(cases, wanted)
    return [found[place] for place in range(len(cases))]


def _computed(cases: Sequence[Case], wanted: dict[int, Analysis[Any]]) -> dict[int, Any]:
    """The result of every analysis, by position."""
    outcomes: dict[int, Any] = {}
    for analysis in dict.fromkeys(wanted.values()):
        places = [place for place, one in wanted.items() if one == analysis]
        unknown = [place for place in places if cases[place].key(analysis) not in cases[place].memo]
        outcomes |= _of_stack(cases, unknown, analysis)
        outcomes |= {place: cases[place].get(analysis) for place in places if place not in outcomes}
    return dict(sorted(outcomes.items()))


def _of_stack(cases: Sequence[Case], places: Iterable[int], analysis: Analysis[Any]) -> dict[int, Any]:
    places = list(places)
    if len(places) < 2:
        return {place: outcome_of(lambda place=place: cases[place].get(analysis)) for place in places}  # type: ignore[misc]
    outcomes: Sequence[Any]
    try:
        outcomes = analysis.compute_stack([cases[place] for place in places])
    except BudgetError as error:
        outcomes = [error] * len(places)
    found = dict(zip(places, outcomes, strict=True))  # checks the count before any result is kept under a wrong key
    for place, outcome in found.items():
        if not isinstance(outcome, BdpruneError):
            cases[place].memo.put(cases[place].key(analysis), outcome)
    return found
