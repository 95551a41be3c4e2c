"""Detects a label that an unusually small trigger leads to (Neural Cleanse's test, on held-out images)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bdprune.analysis import (
    CREDIT,
    LARGEST,
    SEARCHES,
    SMALL_TRIGGER,
    TINY,
    Case,
    Flips,
    attach_triggers,
    flip_table,
    for_few_labels,
    most_outstanding,
    natural_share,
    raised_filters,
    read_flips,
    readable,
    scored,
    search_triggers,
    works,
)
from bdprune.loops import Inversion, InvertSettings, Recovery, Trigger, split_images
from bdprune.methods import Detector, Steps
from bdprune.record import Evidence, Needs, Rule, TriggerKind, some

_PASSES = 4
"""Passes of a clean image for reading a trigger: its flips, and the filters that it raises."""

_NEARLY = 0.5
"""Share of held-out images that a trigger flips which nearly works: the finding says so, though it does not count."""

_MANY = 5
"""With fewer labels than this, sizes of triggers say little: a label has few others to be compared with."""


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

    With fewer labels, a trigger has fewer others to be compared with, and large scores are common on clean networks.
    The threshold is then higher (:func:`bdprune.analysis.for_few_labels`).

    Args:
        search: settings of the search; None takes those of the scan's budget.
        kinds: kinds of triggers to search; empty takes those of the scan's budget.
        threshold: a larger score is flagged in a network of ten labels or more (measurements:
            docs/evaluation/detection.md).
        flip_rate: share of held-out images that a flagged trigger must flip, in [0, 1].
        natural: largest share of filters that a backdoor's trigger has in common with clean images of its label.
        tiny: with a larger score, above the threshold, a trigger is not called natural, and triggers of further kinds
            are not searched.
        seed: seed of the search.
        two_class_threshold: the threshold for two labels (docs/evaluation/calibration.md).
    """

    search: InvertSettings | None = None
    kinds: tuple[TriggerKind, ...] = ()
    threshold: float = SMALL_TRIGGER
    flip_rate: float = 0.75
    natural: float = 0.35
    tiny: float = TINY
    seed: int = 0
    two_class_threshold: float = 4.0

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
        tiny = max(self.tiny, self._threshold(case.model.num_classes))
        found = yield from search_triggers(case, search, self.kinds, self.seed, tiny, self.flip_rate)
        threshold = self._threshold(case.model.num_classes)
        pairs = [pair for inversion in found for pair in scored(inversion)]
        return self._evidence(case, search, found, *most_outstanding(pairs, threshold, self.flip_rate))

    def work(self, case: Case) -> float:
        """A search of two labels."""
        first = (self.search or SEARCHES[case.budget.level]).stages[0]
        return 2.0 * 2 * first.steps * first.images

    def _evidence(
        self, case: Case, search: InvertSettings, found: list[Inversion], score: float, best: Recovery
    ) -> Evidence:
        held = readable(case, split_images(case.images, search, self.seed)[1], found, _PASSES)
        trigger, worked = best.trigger, works(best, self.flip_rate)
        threshold = self._threshold(case.model.num_classes)
        outlier = score > threshold and worked
        nearly = score > threshold and not worked and (trigger.flip_rate or 0.0) >= _NEARLY
        flips = read_flips(flip_table(case.model, trigger, held), trigger.target) if outlier else Flips((), ())
        infos, attached = attach_triggers(case, *([trigger] if math.isfinite(best.size) else []))
        return self.evidence(
            score if worked else min(score, threshold),
            threshold,
            target_label=_only(flips.targets),
            targets=flips.targets if len(flips.targets) > 1 else (),
            sources=flips.sources,
            label_scores=_scores(case.model.num_classes, found),
            near=nearly,
            remarks=(describe_trigger(best, score, worked),),
            limits=few_labels(case.model.num_classes),
            natural=self._natural(case, trigger, found) if outlier and score <= max(self.tiny, threshold) else "",
            unseen=(*unseen_by(found), *(() if len(held) else ("triggers on held-out images",))),
            details=_details(found),
            triggers=infos,
            attachments=attached,
        )

    def _threshold(self, num_classes: int) -> float:
        return for_few_labels(num_classes, self.threshold, self.two_class_threshold)

    def _natural(self, case: Case, trigger: Trigger, found: list[Inversion]) -> str:
        if trigger.target is None:
            return ""
        images = readable(case, case.images, found, _PASSES)
        ranked = raised_filters(case.model, trigger, images.images)
        share = natural_share(case.model, ranked, images, trigger.target)
        if share <= self.natural:
            return ""
        return (
            f"{share:.0%} of the filters that the trigger raises most are also raised by clean images of label "
            f"{trigger.target}, so the trigger shows features of the label."
        )


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
            scores[label] = max(scores[label] or 0.0, min(LARGEST, middle / max(one.size, 1e-6)))
    return tuple(scores)


def describe_trigger(best: Recovery, score: float, works: bool) -> str:
    """A sentence about the trigger with the largest score, and another one if it does not work."""
    if not math.isfinite(best.size):
        return "No trigger flips most images."
    trigger = best.trigger
    goal = "any other label" if trigger.target is None else f"label {trigger.target}"
    origin = f" from label {trigger.sources[0]}" if len(trigger.sources) == 1 else ""
    rate = (
        "" if trigger.flip_rate is None else f" and flips {trigger.flip_rate:.0%} of {trigger.images} held-out images"
    )
    share = CREDIT[trigger.kind] / score if score else 0.0
    compared = f"{share:.2f} of the size of the others" if score else "not compared with others"
    remark = f"The trigger that stands out most leads{origin} to {goal}, is {compared}{rate}."
    if trigger.flip_rate is None and not works:
        return f"{remark} There was no held-out image to try it on."
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
        first = inversion.recoveries[0].hypothesis
        triggers = f"{first.kind} triggers"
        if first.sources:
            pairs = [f"{one.sources[0]} to {one.target}" for one in inversion.skipped]
            unseen += [f"{triggers} from {some(pairs)}"] if pairs else []
        else:
            labels = [str(one.target) for one in inversion.skipped if one.target is not None]
            origin = " from one label" if first.weighted else ""
            unseen += [f"{triggers}{origin} to labels {some(labels)}"] if labels else []
            unseen += [f"{triggers} to any label"] if len(labels) < len(inversion.skipped) else []
        if not inversion.complete:
            unseen.append(f"{triggers} in all steps of the search")
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
