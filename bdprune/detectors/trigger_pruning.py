"""Detects a recovered trigger that stops working when the few filters that it raises most are pruned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from bdprune.analysis import (
    SEARCHES,
    Case,
    PrunedPoint,
    flip_table,
    prune_raised,
    raised_filters,
    read_flips,
    readable,
    scored,
    search_triggers,
    selectivity,
)
from bdprune.detectors.inversion import few_labels, unseen_by
from bdprune.loops import Inversion, InvertSettings, Trigger, split_images
from bdprune.methods import Detector, Steps
from bdprune.record import Evidence, Needs, Rule, TriggerKind, some

_SHARES = (0.0, 0.0033, 0.0067, 0.0133, 0.02, 0.0267, 0.04, 0.0533)
"""Shares of all filters that are pruned. Backdoors of our small zoo stop within the first 2 to 3 %."""


_Examined: TypeAlias = tuple[float, Trigger, list[PrunedPoint]]
"""The score of a trigger, the trigger, and its curve."""


@dataclass(frozen=True)
class TriggerPruningDetector(Detector):
    """Flags a model if pruning a few filters ends the flips of a recovered trigger and costs little accuracy.

    The filters are ranked by how far the trigger raises them above clean images
    (:func:`bdprune.analysis.raised_filters`), and pruned in this order. The score of a trigger is the largest value of
    ``lost flips - weight * lost accuracy``, both relative to the unpruned model, over all numbers of filters. In a
    clean network a trigger uses the features of its label, so the flips end only where the accuracy falls, too. The
    triggers are examined in the order of their scores in :class:`bdprune.detectors.inversion.InversionDetector`, and
    the first one above the threshold counts. Triggers of an ordinary size are not examined: by chance, one of many is
    easy to prune in clean networks, too.

    Args:
        search: settings of the search for triggers; None takes those of the scan's budget.
        kinds: kinds of triggers; empty takes those of the scan's budget.
        threshold: a larger score is flagged (measurements: docs/evaluation/detection.md).
        weight: lost flips that equal the same share of lost accuracy.
        flip_rate: share of held-out images that a trigger must flip to be examined, in [0, 1].
        least: smallest score in :class:`bdprune.detectors.inversion.InversionDetector` of an examined trigger.
        max_images: number of images for each measurement.
        seed: seed of the search.
    """

    search: InvertSettings | None = None
    kinds: tuple[TriggerKind, ...] = ()
    threshold: float = 0.45
    weight: float = 10.0
    flip_rate: float = 0.75
    least: float = 1.5
    max_images: int = 300
    seed: int = 0

    id = "bdprune.trigger_pruning"
    title = "prunes the filters that a recovered trigger raises, and sees whether it stops working"
    paper = "after Wang et al., Neural Cleanse, S&P 2019, whose patching prunes the neurons that a trigger activates"
    needs = Needs(images="labelled", minimum=20)
    cost = "gradients"
    label = True
    sign = "pruning"
    level = "default"
    rule = Rule(
        id="BD050",
        name="separable-trigger",
        help="A recovered trigger stops working when a few filters are pruned that the clean task does not need.",
    )

    def steps(self, case: Case) -> Steps:
        """Examines the strengthened triggers of every kind.

        Raises:
            DataError: there are no clean images, or too few.
        """
        self.check(case)
        search = self.search or SEARCHES[case.budget.level]
        found = yield from search_triggers(case, search, self.kinds, self.seed, flip_rate=self.flip_rate)
        ranked = [
            (score, one.trigger)
            for inversion in found
            for score, one in scored(inversion)
            if score >= self.least and (one.trigger.flip_rate or 0.0) >= self.flip_rate
        ]
        ranked.sort(key=lambda one: -one[0])
        return self._evidence(case, search, [trigger for _, trigger in ranked], found)

    def work(self, case: Case) -> float:
        """The measurements of one trigger; the search is usually known."""
        return float(len(_SHARES) * 2 * min(self.max_images, len(case.images)))

    def _evidence(
        self, case: Case, search: InvertSettings, triggers: list[Trigger], found: list[Inversion]
    ) -> Evidence:
        examined = list(self._examined(case, search, triggers, found))
        highest = max(examined, key=lambda one: one[0], default=None)
        chosen = next((one for one in examined if one[0] > self.threshold), highest)
        score, trigger, points = chosen or (0.0, None, [])
        held = readable(case, split_images(case.images, search, self.seed)[1], found, 1)
        flagged = trigger is not None and score > self.threshold
        flips = read_flips(flip_table(case.model, trigger, held), trigger.target) if flagged and trigger else None
        targets, sources = (flips.targets, flips.sources) if flips else ((), ())
        return self.evidence(
            score,
            self.threshold,
            target_label=targets[0] if len(targets) == 1 else None,
            targets=targets if len(targets) > 1 else (),
            sources=sources,
            remarks=(_remark(trigger, points, self.weight),),
            limits=few_labels(case.model.num_classes),
            unseen=(*unseen_by(found), *_not_examined(triggers[len(examined) :])),
            details={
                "triggers": [
                    {
                        "kind": one.kind,
                        "target": one.target,
                        "score": value,
                        "points": [(p.filters, p.clean_accuracy, p.flip_rate) for p in curve],
                    }
                    for value, one, curve in examined
                ]
            },
        )

    def _examined(
        self, case: Case, search: InvertSettings, triggers: list[Trigger], found: list[Inversion]
    ) -> Iterator[_Examined]:
        """Score and curve of each trigger, as long as there is time."""
        seen, held = split_images(case.images, search, self.seed)
        filters = sum(group.num_filters for group in case.model.groups)
        counts = sorted({round(share * filters) for share in _SHARES})
        for trigger in triggers:
            if case.budget.remaining <= 0:
                return
            some_seen, some_held = (
                readable(case, part.spread(self.max_images), found, 2 * len(counts) + 2) for part in (seen, held)
            )
            ranked = raised_filters(case.model, trigger, some_seen.images)
            points = prune_raised(case.model, trigger, ranked, some_held, counts)
            yield selectivity(points, self.weight), trigger, points


def _not_examined(triggers: list[Trigger]) -> tuple[str, ...]:
    """The triggers that the time did not suffice for."""
    goals = [f"{one.kind} to {'any label' if one.target is None else f'label {one.target}'}" for one in triggers]
    return (f"pruning of the triggers {some(goals)}",) if goals else ()


def _remark(trigger: Trigger | None, points: list[PrunedPoint], weight: float) -> str:
    if trigger is None:
        return "No recovered trigger that flips enough held-out images is small enough to be examined."
    first = points[0]
    least = min(points, key=lambda one: one.flip_rate - weight * one.clean_accuracy)
    goal = "any other label" if trigger.target is None else f"label {trigger.target}"
    return (
        f"After pruning {least.filters} filters, the trigger to {goal} flips {least.flip_rate:.0%} of the held-out "
        f"images instead of {first.flip_rate:.0%}, and clean accuracy is {least.clean_accuracy:.1%} instead of "
        f"{first.clean_accuracy:.1%}."
    )
