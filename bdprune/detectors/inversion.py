"""Detects a label that an unusually small trigger leads to (Neural Cleanse's test, on held-out images)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bdprune.analysis import (
    Case,
    Flips,
    Triggers,
    attach_triggers,
    flip_table,
    natural_share,
    raised_filters,
    read_flips,
)
from bdprune.loops import Inversion, InvertSettings, Recovery, Stage, Trigger, largest_size, split_images
from bdprune.methods import Detector, Steps
from bdprune.record import TRIGGER_KINDS, Evidence, Level, Needs, Rule, TriggerKind, some

_QUICK = InvertSettings(stages=(Stage(40, 8), Stage(40, 16, keep=4)), final=Stage(30, 32, keep=1), rounds=2)
_LONG = InvertSettings(stages=(Stage(60, 8), Stage(100, 16)), final=Stage(30, 32, keep=3))

SEARCHES: Mapping[Level, InvertSettings] = {"fast": _QUICK, "default": InvertSettings(), "full": _LONG}
"""The search at each budget."""

KINDS: Mapping[Level, tuple[TriggerKind, ...]] = {"fast": ("patch",), "default": TRIGGER_KINDS, "full": TRIGGER_KINDS}
"""The kinds of triggers that are searched at each budget."""

_MANY = 5
"""With fewer labels than this, sizes of triggers say little: a label has few others to be compared with."""

TINY = 3.0
"""Scores above it: the trigger is far smaller than all others (scores of clean networks:
docs/evaluation/detection.md).
"""

_CREDIT: Mapping[TriggerKind, float] = {"patch": 1.0, "additive": 1.0, "warp": 0.75}
"""Factor of the scores of a kind. Few labels can be reached by a warp at all, so the scores of warps vary more."""

_SEARCHING = 0.9
"""Share of the time for the searches; the rest is for reading the triggers."""

_OF_A_KIND = 0.6
"""Share of this time for each kind but the last one. The first kinds find most backdoors."""

_LARGEST = 10.0
"""Largest score; a trigger of size 0 has no finite one."""


@dataclass(frozen=True)
class InversionDetector(Detector):
    """Flags a model if one label needs a far smaller trigger than the others, and the trigger works on new images.

    For every label, and for no label in particular, the detector searches the smallest trigger that flips images of all
    other labels (:func:`bdprune.loops.invert`). The score of a trigger says how much larger the others are that took
    part in the last stage: the geometric mean of the next and of the median size, divided by its own, and multiplied by
    0.75 for a warp, whose sizes vary more. The largest score counts. An untargeted trigger with such a score is the
    sign of an all-to-all backdoor: its targets are the labels that it flips the images of each label to.

    A trigger may be small because it shows features of its label. It then raises the filters that clean images of that
    label raise (compare Liu et al., Complex Backdoor Detection by Symmetric Feature Differencing, CVPR 2022). If the
    share of common filters among those raised most is above ``natural``, the evidence says so and does not count. This
    holds only for scores up to ``tiny``: a far smaller trigger than all others is too small to show such features.

    Args:
        search: settings of the search; None takes those of the scan's budget.
        kinds: kinds of triggers to search; empty takes those of the scan's budget.
        threshold: a larger score is flagged (measurements: docs/evaluation/detection.md).
        flip_rate: share of held-out images that a flagged trigger must flip, in [0, 1].
        natural: largest share of filters that a backdoor's trigger has in common with clean images of its label.
        tiny: with a larger score, a trigger is not called natural, and triggers of further kinds are not searched.
        seed: seed of the search.
    """

    search: InvertSettings | None = None
    kinds: tuple[TriggerKind, ...] = ()
    threshold: float = 1.7
    flip_rate: float = 0.75
    natural: float = 0.35
    tiny: float = TINY
    seed: int = 0

    id = "bdprune.inversion"
    title = "finds a label that an unusually small trigger leads to"
    paper = "Wang et al., Neural Cleanse, S&P 2019; scheduled as in Shen et al., ICML 2021, arXiv 2102.05123"
    needs = Needs(images="labelled", minimum=20)
    cost = "gradients"
    gives = ("detection", "trigger recovery")
    label = True
    limits = (
        "It finds triggers that are small for their kind. Backdoors with large or image-dependent ones stay unseen."
    )
    sign = "trigger"
    level = "fast"
    rule = Rule(
        id="BD040",
        name="small-trigger",
        help="A recovered trigger is far smaller than those of other labels, and it flips images that the search has "
        "not seen.",
    )

    def steps(self, case: Case) -> Steps:
        """Searches triggers of each kind, and compares their sizes.

        Raises:
            DataError: there are no clean images, or too few.
        """
        self.check(case)
        search = self.search or SEARCHES[case.budget.level]
        kinds = self.kinds or KINDS[case.budget.level]
        best: tuple[float, Recovery] | None = None
        found: list[Inversion] = []
        for kind in kinds:
            limit = case.budget.share(_SEARCHING * (_OF_A_KIND if kind != kinds[-1] else 1.0))
            inversion = yield Triggers(search, kind, seed=self.seed, seconds=limit)
            found.append(inversion)
            own = smallest(inversion)
            best = own if best is None or own[0] > best[0] else best
            if suffices(inversion, self.tiny, self.flip_rate):
                break
        assert best is not None
        return self._evidence(case, search, found, *best)

    def work(self, case: Case) -> float:
        """A search of two labels."""
        first = (self.search or SEARCHES[case.budget.level]).stages[0]
        return 3.0 * 2 * first.steps * first.images

    def _evidence(
        self, case: Case, search: InvertSettings, found: list[Inversion], score: float, best: Recovery
    ) -> Evidence:
        held = split_images(case.images, search, self.seed)[1]
        trigger = best.trigger
        works = (trigger.flip_rate or 0.0) >= self.flip_rate
        outlier = score > self.threshold and works
        flips = read_flips(flip_table(case.model, trigger, held), trigger.target) if outlier else Flips((), ())
        infos, attached = attach_triggers(case, *([trigger] if math.isfinite(best.size) else []))
        return self.evidence(
            score if works else min(score, self.threshold),
            self.threshold,
            target_label=_only(flips.targets),
            targets=flips.targets if len(flips.targets) > 1 else (),
            sources=flips.sources,
            label_scores=_scores(case.model.num_classes, found),
            remarks=(_remark(best, score, works),),
            limits=few_labels(case.model.num_classes),
            natural=self._natural(case, trigger) if outlier and score <= self.tiny else "",
            unseen=unseen_by(found),
            details=_details(found),
            triggers=infos,
            attachments=attached,
        )

    def _natural(self, case: Case, trigger: Trigger) -> str:
        if trigger.target is None:
            return ""
        ranked = raised_filters(case.model, trigger, case.images.images)
        share = natural_share(case.model, ranked, case.images, trigger.target)
        if share <= self.natural:
            return ""
        return (
            f"{share:.0%} of the filters that the trigger raises most are also raised by clean images of label "
            f"{trigger.target}, so the trigger shows features of the label."
        )


def scored(inversion: Inversion) -> list[tuple[float, Recovery]]:
    """The results of the hypotheses that took part in the last stage, with their scores."""
    last = max(one.stages for one in inversion.recoveries)
    kept = [one for one in inversion.recoveries if one.stages == last]
    return [(_score(one, kept), one) for one in kept]


def smallest(inversion: Inversion) -> tuple[float, Recovery]:
    """The score and the result of the hypothesis with the largest score."""
    return max(scored(inversion), key=lambda pair: pair[0])


def suffices(inversion: Inversion, tiny: float, flip_rate: float) -> bool:
    """Whether a trigger is so much smaller than the others that triggers of further kinds need not be searched."""
    score, best = smallest(inversion)
    return score > tiny and (best.trigger.flip_rate or 0.0) >= flip_rate


def _score(one: Recovery, kept: list[Recovery]) -> float:
    """The geometric mean of two ratios to its size: of the next larger trigger, and of the median one.

    The others are the triggers with a target; those that were never successful count with their largest possible size.
    The next one alone may be small by chance, and the median grows with the labels that are hard to reach.
    """
    others = [_limited(other) for other in kept if other is not one and other.hypothesis.target is not None]
    if not math.isfinite(one.size) or not others:
        return 0.0
    ratio = math.sqrt(min(others) * statistics.median(others)) / max(one.size, 1e-6)
    return min(_LARGEST, ratio * _CREDIT[one.trigger.kind])


def _limited(one: Recovery) -> float:
    """The size of a trigger; the largest possible one if it was never successful."""
    return one.size if math.isfinite(one.size) else largest_size(one.trigger)


def _only(targets: tuple[int, ...]) -> int | None:
    return targets[0] if len(targets) == 1 else None


def _scores(num_classes: int, found: list[Inversion]) -> tuple[float | None, ...]:
    """For each label the median size of all triggers, divided by its smallest one; None if it was not searched."""
    scores: list[float | None] = [None] * num_classes
    for inversion in found:
        sized = [one for one in inversion.recoveries if one.hypothesis.target is not None and math.isfinite(one.size)]
        middle = statistics.median([one.size for one in sized]) if sized else 0.0
        for one in sized:
            label = one.hypothesis.target
            assert label is not None
            scores[label] = max(scores[label] or 0.0, min(_LARGEST, middle / max(one.size, 1e-6)))
    return tuple(scores)


def _remark(best: Recovery, score: float, works: bool) -> str:
    if not math.isfinite(best.size):
        return "No trigger flips most images."
    trigger = best.trigger
    goal = "any other label" if trigger.target is None else f"label {trigger.target}"
    rate = (
        "" if trigger.flip_rate is None else f" and flips {trigger.flip_rate:.0%} of {trigger.images} held-out images"
    )
    share = _CREDIT[trigger.kind] / score if score else 0.0
    compared = f"{share:.2f} of the size of the others" if score else "not compared with others"
    remark = f"The smallest trigger leads to {goal}, is {compared}{rate}."
    return remark if works else f"{remark} It flips too few of them to count."


def few_labels(num_classes: int) -> tuple[str, ...]:
    """That there are too few labels to compare triggers well, as a sentence; empty if there are enough."""
    if num_classes >= _MANY:
        return ()
    return (f"With {num_classes} classes, the size of a trigger has few others to be compared with.",)


def unseen_by(found: Sequence[Inversion]) -> tuple[str, ...]:
    """What the searches did not look at, a phrase each."""
    unseen = []
    for inversion in found:
        kind = inversion.recoveries[0].hypothesis.kind
        labels = [str(one.target) for one in inversion.skipped if one.target is not None]
        if labels:
            unseen.append(f"{kind} triggers to labels {some(labels)}")
        if len(labels) < len(inversion.skipped):
            unseen.append(f"{kind} triggers to any label")
        if not inversion.complete:
            unseen.append(f"{kind} triggers in all steps of the search")
    return tuple(unseen)


def _details(found: list[Inversion]) -> dict[str, object]:
    """Every hypothesis with its size and the stages that it took part in."""
    return {
        one.recoveries[0].hypothesis.kind: {
            "triggers": [
                {
                    "target": each.hypothesis.target,
                    "size": each.size,
                    "stages": each.stages,
                    "flip_rate": each.trigger.flip_rate,
                }
                for each in one.recoveries
            ],
            "image_steps": one.image_steps,
        }
        for one in found
    }
