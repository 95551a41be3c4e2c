"""The pairs of source and target that are worth a search of their own, in a network with too many pairs."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from bdprune.analysis.case import Case
from bdprune.analysis.latent import LabelOrder
from bdprune.analysis.triggers import MOST_LABELS, Triggers
from bdprune.loops import Hypothesis, Inversion, InvertSettings

_OF_A_TARGET = 2
"""Limit for the sources of one target."""

_SHARE = 0.45
"""Share of the time for this search; the rest is for the pairs."""


def search_sources(case: Case, settings: InvertSettings, seed: int) -> Generator[Triggers, Inversion, Inversion]:
    """Yields a search for one patch to each target label, which specialises on the source that flips most easily.

    It takes the target labels that the features reach most easily, as many as the budget allows
    (:data:`bdprune.analysis.triggers.MOST_LABELS`).

    Args:
        case: the model, with labelled clean images.
        settings: of the search.
        seed: seed of the search.

    Returns:
        The result; labels beyond the limit are among its skipped ones.
    """
    classes = case.model.num_classes
    order: list[int] = case.get(LabelOrder()).tolist()
    wanted = tuple(Hypothesis(target, weighted=True) for target in order)
    most = MOST_LABELS[case.budget.level] or classes
    limit = case.budget.share(_SHARE)
    found = yield Triggers(settings, hypotheses=wanted[:most], seed=seed, seconds=limit)
    return replace(found, skipped=(*found.skipped, *wanted[most:]))


def easiest_pairs(found: Inversion, most: int) -> tuple[Hypothesis, ...]:
    """At most ``most`` pairs: the easiest source of each target, then the next ones; targets of small triggers first.

    Args:
        found: from :func:`search_sources`.
        most: limit for the pairs, at least 1.
    """
    ordered = sorted(found.recoveries, key=lambda one: one.size)
    pairs = [
        Hypothesis(one.hypothesis.target, (one.sources[place],))
        for place in range(_OF_A_TARGET)
        for one in ordered
        if place < len(one.sources)
    ]
    return tuple(pairs[:most])
