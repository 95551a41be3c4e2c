"""Detects a small trigger that flips the images of one label to another, as source-specific backdoors have."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bdprune.analysis import Case, LabelOrder, Triggers, attach_triggers, easiest_pairs, scored, search_sources, works
from bdprune.detectors.inversion import describe_trigger, few_labels, unseen_by
from bdprune.loops import Hypothesis, Inversion, InvertSettings, Stage
from bdprune.methods import Detector, Steps
from bdprune.record import Evidence, Needs, Rule, some

_SEARCHING = 0.9
"""Share of the time for the search."""

_SEARCH = InvertSettings(stages=(Stage(60, 8), Stage(60, 16, keep=12)), final=Stage(30, 32, keep=3))
_SOURCES = InvertSettings(stages=(Stage(60, 16),), final=Stage(1, 1, keep=1), rounds=0)

_SUPPORTING = (
    "Images of one label are easily turned into another in some clean networks, too, so this counts only if evidence "
    "of another kind names the same label."
)


@dataclass(frozen=True)
class PairInversionDetector(Detector):
    """Finds the pair of labels with the smallest trigger that flips images of the one to the other.

    It searches for a patch for each pair of labels (:func:`bdprune.loops.invert`). If there are too many labels for
    that, it first searches for one patch to each target label. The sources have weights there, so that the patch
    specialises on the source whose images flip most easily. The two easiest sources of each target then make the
    pairs, at most as many as ``most_labels`` labels have. Targets with small patches come first. The score is that of
    :class:`bdprune.detectors.inversion.InversionDetector` among the pairs of the last stage, for the pairs whose
    trigger works on held-out images. In some clean networks a pair stands out as far, and nearly works
    (docs/evaluation/candidates.md). A finding therefore only supports evidence of another kind that names the same
    label.

    Args:
        search: settings of the search.
        threshold: a larger score is flagged.
        flip_rate: share of the held-out images of its source that a flagged trigger must flip, in [0, 1].
        most_labels: with more labels, the first search chooses the pairs.
        seed: seed of the searches.
        source_search: settings of the first search.
    """

    search: InvertSettings = _SEARCH
    threshold: float = 1.7
    flip_rate: float = 0.75
    most_labels: int = 11
    seed: int = 0
    source_search: InvertSettings = _SOURCES

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
        if case.model.num_classes <= self.most_labels:
            first, pairs = None, self._pairs(case, order)
        else:
            first = yield from search_sources(case, self.source_search, self.seed)
            pairs = easiest_pairs(first, self._most_pairs)
        limit = case.budget.share(_SEARCHING)
        inversion = yield Triggers(self.search, hypotheses=pairs, seed=self.seed, seconds=limit)
        return self._evidence(case, inversion, first)

    def work(self, case: Case) -> float:
        """The first stage for a tenth of the pairs, and before it for a tenth of the targets."""
        classes, first = case.model.num_classes, self.search.stages[0]
        if classes <= self.most_labels:
            return 0.2 * classes * (classes - 1) * first.steps * first.images
        before = self.source_search.stages[0]
        return 0.2 * (self._most_pairs * first.steps * first.images + classes * before.steps * before.images)

    @property
    def _most_pairs(self) -> int:
        return self.most_labels * (self.most_labels - 1)

    def _evidence(self, case: Case, inversion: Inversion, first: Inversion | None) -> Evidence:
        score, best = max(scored(inversion), key=lambda pair: (works(pair[1], self.flip_rate), pair[0]))
        worked = works(best, self.flip_rate)
        flagged = worked and score > self.threshold
        infos, attached = attach_triggers(case, *([best.trigger] if worked else []))
        return self.evidence(
            score if worked else min(score, self.threshold),
            self.threshold,
            target_label=best.hypothesis.target if flagged else None,
            sources=best.hypothesis.sources if flagged else (),
            label_scores=self._label_scores(case.model.num_classes, inversion),
            remarks=(describe_trigger(best, score, worked),),
            limits=(*few_labels(case.model.num_classes), *self._left_out(case, inversion)),
            supporting=_SUPPORTING,
            unseen=unseen_by([inversion] if first is None else [first, inversion]),
            details=_details(inversion, first),
            triggers=infos,
            attachments=attached,
        )

    def _pairs(self, case: Case, order: Tensor) -> tuple[Hypothesis, ...]:
        """All pairs whose source has images. The pairs of labels that the features reach easily come first."""
        given = set(case.images.labels.tolist())
        targets: list[int] = order.tolist()
        sources = [label for label in targets if label in given]
        places = {
            (source, target): place + other
            for place, target in enumerate(targets)
            for other, source in enumerate(sources)
            if source != target
        }
        return tuple(Hypothesis(target, (source,)) for source, target in sorted(places, key=places.__getitem__))

    def _label_scores(self, num_classes: int, inversion: Inversion) -> tuple[float | None, ...]:
        """For each label the largest score of a working trigger to it; None if there is none."""
        scores: list[float | None] = [None] * num_classes
        for score, one in scored(inversion):
            label = one.hypothesis.target
            if label is not None and works(one, self.flip_rate):
                scores[label] = max(scores[label] or 0.0, score)
        return tuple(scores)

    def _left_out(self, case: Case, inversion: Inversion) -> tuple[str, ...]:
        """Which pairs were not searched for, in sentences."""
        classes = case.model.num_classes
        absent = case.images.absent_labels(classes)
        found = []
        if classes > self.most_labels:
            found.append(
                f"Of {classes * (classes - 1):,} pairs of labels, {len(inversion.recoveries)} were searched for: those "
                "that a first search for each target found easiest."
            )
        if absent:
            found.append(f"There are no clean images of labels {some([str(label) for label in absent])} to start from.")
        return tuple(found)


def _details(inversion: Inversion, first: Inversion | None) -> dict[str, object]:
    """Every pair with its size and the stages that it took part in, and every target of the first search."""
    details: dict[str, object] = {
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
    }
    if first is not None:
        details["targets"] = [
            {"target": one.hypothesis.target, "sources": list(one.sources), "size": one.size}
            for one in first.recoveries
        ]
        details["image_steps"] = inversion.image_steps + first.image_steps
    return details
