"""The searches for triggers that detectors share, and how far each trigger stands out."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace

from bdprune.analysis.case import Case
from bdprune.analysis.triggers import Triggers
from bdprune.data import CleanData
from bdprune.loops import Inversion, InvertSettings, PenaltyRule, Recovery, Stage, largest_size, size_scores
from bdprune.record import TRIGGER_KINDS, Level, TriggerKind

_QUICK = InvertSettings(stages=(Stage(40, 8), Stage(40, 16, keep=4)), final=Stage(30, 32, keep=2), rounds=2)
_LONG = InvertSettings(stages=(Stage(60, 8), Stage(100, 16)), final=Stage(30, 32, keep=3))
_OUTSTANDING = 1.4  # no detector reads a trigger with a smaller score, so it need not be strengthened

SEARCHES: Mapping[Level, InvertSettings] = {
    "fast": replace(_QUICK, outstanding=_OUTSTANDING),
    "default": InvertSettings(outstanding=_OUTSTANDING),
    "full": replace(_LONG, outstanding=_OUTSTANDING),
}
"""The search for each kind of trigger at each budget."""

CLEANSING = InvertSettings(stages=(Stage(60, 8), Stage(60, 16)), final=Stage(30, 32, keep=1))
"""The search: every label takes part in all stages, so that all sizes can be compared."""

PUBLISHED_CLEANSING = InvertSettings(
    stages=(Stage(1000, 32),),
    final=Stage(1, 32, keep=1),
    rounds=0,
    success=0.99,
    lr=0.2,
    penalty=PenaltyRule(first=1e-3, factor=2.0, patience=5, from_zero=True),
    held_out=0.1,
    only_right=False,
)
"""The schedule of the paper. Its variables are half as large (``tanh(a) / 2 + 1/2`` is ``sigmoid(2 a)``), so that its
learning rate of 0.1 is 0.2 here."""

KINDS: Mapping[Level, tuple[TriggerKind, ...]] = {"fast": ("patch",), "default": TRIGGER_KINDS, "full": TRIGGER_KINDS}
"""The kinds of triggers that are searched at each budget."""

TINY = 3.0
"""Scores above it: the trigger is far smaller than all others (scores of clean networks:
docs/evaluation/detection.md).
"""

LARGEST = 10.0
"""Largest score; a trigger of size 0 has no finite one."""

CREDIT: Mapping[TriggerKind, float] = {"patch": 1.0, "additive": 1.0, "warp": 0.75}
"""Factor of the scores of a kind. Few labels can be reached by a warp at all, so the scores of warps vary more."""

_SEARCHING = 0.9
"""Share of the time for the searches; the rest is for reading the triggers."""

_FEWEST = 20
"""The number of images that show what a trigger does, even if time is short."""

_OF_ONE = 0.6
"""Share of this time for each search but the last one. The first searches find most backdoors."""


def search_triggers(
    case: Case,
    search: InvertSettings,
    kinds: Sequence[TriggerKind],
    seed: int,
    tiny: float = TINY,
    flip_rate: float = 0.75,
) -> Generator[Triggers, Inversion, list[Inversion]]:
    """Yields the searches of a detector, one for each kind of trigger.

    No further search follows one with a trigger so small that others need not be searched.

    Args:
        case: the model.
        search: settings of the search for each kind.
        kinds: kinds of triggers; empty takes those of the scan's budget.
        seed: seed of the searches.
        tiny: with a larger score, a trigger is that small.
        flip_rate: share of held-out images that it must flip, in [0, 1].

    Returns:
        The result of each search.
    """
    searches = [Triggers(search, kind, seed=seed) for kind in kinds or KINDS[case.budget.level]]
    found: list[Inversion] = []
    for one in searches:
        limit = case.budget.share(_SEARCHING * (_OF_ONE if one is not searches[-1] else 1.0))
        found.append((yield replace(one, seconds=limit)))
        if any(score > tiny and works(recovery, flip_rate) for score, recovery in scored(found[-1])):
            break
    return found


def readable(case: Case, data: CleanData, found: Sequence[Inversion], passes: int) -> CleanData:
    """As many of the images as can pass through the network in the time that is left; all without a time limit.

    Args:
        case: the model.
        data: clean images.
        found: earlier searches, whose steps show how fast the network is.
        passes: number of passes of each image.
    """
    left = case.budget.share(1.0)
    steps = sum(one.image_steps for one in found)
    if left is None or not steps:
        return data
    pace = sum(one.seconds for one in found) / steps  # of a forward and a backward pass, so longer than needed
    return data.spread(max(_FEWEST, int(left / (pace * passes))))


def scored(inversion: Inversion) -> list[tuple[float, Recovery]]:
    """The results of the hypotheses that took part in the last stage, with their scores.

    A score is :func:`bdprune.loops.size_scores`, at most 10; a warp has less credit.
    """
    last = max(one.stages for one in inversion.recoveries)
    kept = [one for one in inversion.recoveries if one.stages == last]
    scores = size_scores(
        [one.size for one in kept],
        [one.hypothesis.target is not None for one in kept],
        largest_size(kept[0].trigger),
    )
    credits = [CREDIT[one.trigger.kind] for one in kept]
    return [(min(LARGEST, score * credit), one) for score, credit, one in zip(scores, credits, kept, strict=True)]


def works(recovery: Recovery, flip_rate: float) -> bool:
    """Whether a trigger was successful in the search and flips this share of the held-out images."""
    return math.isfinite(recovery.size) and (recovery.trigger.flip_rate or 0.0) >= flip_rate


def most_outstanding(
    pairs: Iterable[tuple[float, Recovery]], threshold: float, flip_rate: float
) -> tuple[float, Recovery]:
    """The largest score of a trigger that works and whose score is above the threshold, and its result.

    A smaller trigger that does not work must not hide it. Without such a trigger it is the largest score of all.
    """
    return max(pairs, key=lambda pair: (pair[0] > threshold and works(pair[1], flip_rate), pair[0]))
