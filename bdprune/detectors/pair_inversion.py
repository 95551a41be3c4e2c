"""Detects a small trigger that flips the images of one label to another, as source-specific backdoors have."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from bdprune.analysis import Case, LabelOrder, Triggers, attach_triggers, scored
from bdprune.detectors.inversion import describe_trigger, few_labels, unseen_by
from bdprune.loops import Hypothesis, Inversion, InvertSettings, Recovery, Stage
from bdprune.methods import Detector, Steps
from bdprune.record import Evidence, Needs, Rule, some

_SEARCHING = 0.9
"""Share of the time for the search."""

_SEARCH = InvertSettings(stages=(Stage(60, 8), Stage(60, 16, keep=12)), final=Stage(30, 32, keep=3))

_SUPPORTING = (
    "Images of one label are easily turned into another in some clean networks, too, so this counts only if evidence "
    "of another kind names the same label."
)


@dataclass(frozen=True)
class PairInversionDetector(Detector):
    """Finds the pair of labels with the smallest trigger that flips images of the one to the other.

    It searches for a patch for each pair of labels (:func:`bdprune.loops.invert`). The score is that of
    :class:`bdprune.detectors.inversion.InversionDetector` among the pairs of the last stage, for the pairs whose
    trigger works on held-out images. In some clean networks a pair stands out as far, and nearly works
    (docs/evaluation/candidates.md). A finding therefore only supports evidence of another kind that names the same
    label.

    Args:
        search: settings of the search.
        threshold: a larger score is flagged.
        flip_rate: share of the held-out images of its source that a flagged trigger must flip, in [0, 1].
        most_labels: with more labels, only pairs of those are searched for that the features reach most easily.
        seed: seed of the search.
    """

    search: InvertSettings = _SEARCH
    threshold: float = 1.7
    flip_rate: float = 0.75
    most_labels: int = 11
    seed: int = 0

    id = "bdprune.pair_inversion"
    title = "finds a small trigger that flips images of one label to another"
    paper = "after Shen et al., K-Arm, ICML 2021, arXiv 2102.05123, which searches triggers of pairs of labels"
    needs = Needs(images="labelled", minimum=20)
    cost = "gradients"
    gives = ("detection", "trigger recovery")
    label = True
    limits = "It finds patches only. The images must have every label that a backdoor may flip."
    sign = "trigger"
    level = "full"
    rule = Rule(
        id="BD080",
        name="small-trigger-of-one-label",
        help="A recovered trigger turns images of one label into another, and is far smaller than those of other pairs "
        "of labels.",
    )

    def steps(self, case: Case) -> Steps:
        """Searches for a trigger for each pair of labels, and compares their sizes.

        Raises:
            DataError: there are no clean images, or too few.
        """
        self.check(case)
        order = yield LabelOrder()
        limit = case.budget.share(_SEARCHING)
        inversion = yield Triggers(self.search, hypotheses=self._pairs(case, order), seed=self.seed, seconds=limit)
        return self._evidence(case, inversion)

    def work(self, case: Case) -> float:
        """The first stage for a tenth of the pairs."""
        first, labels = self.search.stages[0], min(self.most_labels, case.model.num_classes)
        return 0.2 * labels * (labels - 1) * first.steps * first.images

    def _evidence(self, case: Case, inversion: Inversion) -> Evidence:
        score, best = max(scored(inversion), key=lambda pair: (self._works(pair[1]), pair[0]))
        works = self._works(best)
        flagged = works and score > self.threshold
        infos, attached = attach_triggers(case, *([best.trigger] if works else []))
        return self.evidence(
            score if works else min(score, self.threshold),
            self.threshold,
            target_label=best.hypothesis.target if flagged else None,
            sources=best.hypothesis.sources if flagged else (),
            label_scores=self._label_scores(case.model.num_classes, inversion),
            remarks=(describe_trigger(best, score, works),),
            limits=(*few_labels(case.model.num_classes), *self._left_out(case)),
            supporting=_SUPPORTING,
            unseen=unseen_by([inversion]),
            details={
                "pairs": [
                    {
                        "source": one.hypothesis.sources[0],
                        "target": one.hypothesis.target,
                        "size": one.size,
                        "stages": one.stages,
                        "flip_rate": one.trigger.flip_rate,
                    }
                    for one in inversion.recoveries
                ],
                "image_steps": inversion.image_steps,
            },
            triggers=infos,
            attachments=attached,
        )

    def _pairs(self, case: Case, order: Tensor) -> tuple[Hypothesis, ...]:
        """The pairs of the labels that are easiest to reach; sources have images. The easiest pairs come first."""
        given = set(case.images.labels.tolist())
        labels: list[int] = order.tolist()
        targets = labels[: self.most_labels]
        sources = [label for label in labels if label in given][: self.most_labels]
        places = {
            (source, target): place + other
            for place, target in enumerate(targets)
            for other, source in enumerate(sources)
            if source != target
        }
        return tuple(Hypothesis(target, (source,)) for source, target in sorted(places, key=places.__getitem__))

    def _works(self, one: Recovery) -> bool:
        return math.isfinite(one.size) and (one.trigger.flip_rate or 0.0) >= self.flip_rate

    def _label_scores(self, num_classes: int, inversion: Inversion) -> tuple[float | None, ...]:
        """For each label the largest score of a working trigger to it; None if there is none."""
        scores: list[float | None] = [None] * num_classes
        for score, one in scored(inversion):
            label = one.hypothesis.target
            if label is not None and self._works(one):
                scores[label] = max(scores[label] or 0.0, score)
        return tuple(scores)

    def _left_out(self, case: Case) -> tuple[str, ...]:
        """Which pairs were not searched for, in sentences."""
        classes = case.model.num_classes
        absent = sorted(set(range(classes)) - set(case.images.labels.tolist()))
        found = []
        if classes > self.most_labels:
            found.append(
                f"Of {classes} labels, only pairs of the {self.most_labels} easiest to reach were searched for."
            )
        if absent:
            found.append(f"There are no clean images of labels {some([str(label) for label in absent])} to start from.")
        return tuple(found)
