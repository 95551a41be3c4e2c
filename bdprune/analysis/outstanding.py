"""The recovered triggers that stand out, and how a repaired network compares with them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from bdprune.analysis.case import Case
from bdprune.analysis.trigger_search import CREDIT, LARGEST, SEARCHES, scored, search_triggers
from bdprune.analysis.triggers import Triggers
from bdprune.loops import GrowthSettings, Hypothesis, Inversion, InvertSettings, Trigger, grow, largest_size, size_score
from bdprune.record import TriggerKind


@dataclass(frozen=True, eq=False)
class Outstanding:
    """A recovered trigger that is unusually small for its kind.

    Attributes:
        trigger: the trigger.
        score: how far it stands out (:func:`bdprune.analysis.scored`).
        size: size of the smallest one that worked in the search, in pixels.
        others: sizes of the triggers of this kind that lead to the other labels.
        grown: the strongest patch around it (:func:`bdprune.loops.grow`); None if there is none, or it is not known.
    """

    trigger: Trigger
    score: float
    size: float
    others: tuple[float, ...]
    grown: Trigger | None = None

    @property
    def hypothesis(self) -> Hypothesis:
        """What was searched."""
        return Hypothesis(self.trigger.target, self.trigger.sources, self.trigger.kind)

    @property
    def name(self) -> str:
        """Kind and goal, such as ``patch to label 3``."""
        return (
            f"{self.trigger.kind} to {'any label' if self.trigger.target is None else f'label {self.trigger.target}'}"
        )

    def score_of(self, size: float) -> float:
        """The score of a trigger of this size, compared with the same others."""
        return min(LARGEST, size_score(size, self.others) * CREDIT[self.trigger.kind])


@dataclass(frozen=True)
class SearchFor:
    """Which triggers a repair searches.

    Args:
        settings: of the search; None takes those of the case's budget.
        kinds: kinds of triggers; empty takes those of the case's budget.
        flip_rate: share of held-out images that a trigger must flip, in [0, 1].
    """

    settings: InvertSettings | None = None
    kinds: tuple[TriggerKind, ...] = ()
    flip_rate: float = 0.75

    def settings_for(self, case: Case) -> InvertSettings:
        """The settings of the search."""
        return self.settings or SEARCHES[case.budget.level]


def outstanding_triggers(case: Case, search: SearchFor, least: float = 1.5, seed: int = 0) -> list[Outstanding]:
    """The triggers of all kinds that stand out and work on held-out images, the smallest for its kind first.

    Args:
        case: the model with its clean images.
        search: which triggers are searched.
        least: smallest score.
        seed: seed of the search.

    Raises:
        DataError: there is no image to search with.
    """
    steps = search_triggers(case, search.settings_for(case), search.kinds, seed, flip_rate=search.flip_rate)
    wanted, found = next(steps), []
    while True:
        try:
            wanted = steps.send(case.get(wanted))
        except StopIteration as done:
            found = done.value
            break
    chosen = [one for inversion in found for one in _of(inversion, least, search.flip_rate)]
    return sorted(chosen, key=lambda one: -one.score)


def with_grown(case: Case, known: Outstanding, settings: GrowthSettings, seed: int = 0) -> Outstanding:
    """The same with its grown patch, for the network of ``case``."""
    if known.grown is not None:
        return known
    images, labels = case.images.images, case.images.labels
    return replace(known, grown=grow(case.model.module, known.trigger, images, labels, settings, seed))


def _of(inversion: Inversion, least: float, flip_rate: float) -> list[Outstanding]:
    scores = scored(inversion)
    sizes = [
        (one, min(one.size, largest_size(one.trigger)) if math.isfinite(one.size) else largest_size(one.trigger))
        for _, one in scores
    ]
    return [
        Outstanding(
            one.trigger,
            score,
            one.size,
            tuple(size for other, size in sizes if other is not one and other.hypothesis.target is not None),
        )
        for score, one in scores
        if score >= least and (one.trigger.flip_rate or 0.0) >= flip_rate
    ]


def search_again(case: Case, known: Outstanding, search: SearchFor, seed: int = 0) -> Outstanding:
    """The trigger that the same search finds in the network of ``case``, compared with the known one's others.

    Args:
        case: another form of the network, such as a repaired one.
        known: a trigger of the original network.
        search: which triggers were searched.
        seed: seed of the search.
    """
    alone = replace(search.settings_for(case), outstanding=0.0)
    found = case.get(Triggers(alone, known.trigger.kind, (known.hypothesis,), seed)).recoveries[0]
    return Outstanding(found.trigger, known.score_of(found.size), found.size, known.others)


def excess_flips(trigger: Trigger, clean: Tensor, stamped: Tensor, labels: Tensor) -> float:
    """Share of images that a trigger flips, less the share that is predicted so without it, in [0, 1].

    Args:
        trigger: the trigger.
        clean: predictions ``[N]`` for the images that the trigger is about.
        stamped: predictions ``[N]`` for the same images with the trigger.
        labels: their labels ``[N]``.

    Returns:
        0 if there are no images.
    """
    if not len(labels):
        return 0.0
    more = trigger.flips(stamped, labels).float().mean() - trigger.flips(clean, labels).float().mean()
    return max(more.item(), 0.0)
