"""Detects a label that a small trigger leads to, by the median absolute deviation of sizes (Neural Cleanse)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from bdprune.analysis import (
    CLEANSING,
    PUBLISHED_CLEANSING,
    Case,
    Triggers,
    attach_triggers,
    most_outstanding,
    why_no_outlier,
    works,
)
from bdprune.detectors.inversion import InversionDetector, few_labels, unseen_by
from bdprune.loops import Hypothesis, Inversion, InvertSettings, Recovery
from bdprune.methods import Detector, Steps
from bdprune.record import Cost, Evidence, Needs, Sign

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {"search": PUBLISHED_CLEANSING, "least_spread": 0.0, "flip_rate": 0.0},
    "robust": {},
}

_SCALE = 1.4826  # the median absolute deviation of normal values, times this, is their standard deviation
_LARGEST = 100.0  # largest index: without a floor, equal sizes have no finite one
_SMALLEST = 0.1  # sizes below this many pixels have the same logarithm
_SEARCHING = 0.9  # share of the time for the search


@dataclass(frozen=True)
class NeuralCleanseDetector(Detector):
    """Flags a model if one label needs an unusually small trigger, as Neural Cleanse does.

    For every label t, the detector searches the mask m and the pattern p with the smallest sum of m for which
    ``(1 - m) x + m p`` is predicted as t. The anomaly index of a label is ``(median - size) / MAD``. MAD is 1.4826
    times the median absolute deviation of all sizes. The label of the smallest trigger is named if its index is above
    ``threshold``. A label without a successful trigger counts with the size of the whole image.

    With few labels, MAD can be close to 0 by chance, and any label is then an outlier. So the default takes
    ``least_spread`` of the median if MAD is smaller, and the trigger must work on held-out images. The preset ``paper``
    does neither. It takes 1,000 updates on 32 images each. The published code takes up to 31 updates in each of its
    1,000 steps, and its penalty rule follows the mean success of a step; here it follows the running average of the
    updates, so the penalty rises after fewer of them. Further differences: 10 % of the images are held out; images of
    the target label are left out; masks start at an opacity of 0.05; no label stops early, because all labels are
    searched in the same steps.

    The detector :class:`bdprune.detectors.inversion.InversionDetector` supersedes this one in scans.

    Args:
        search: settings of the search.
        threshold: a larger index is flagged (measurements: docs/evaluation/labels.md).
        least_spread: smallest MAD, as a share of the median size.
        flip_rate: share of held-out images that a flagged trigger must flip, in [0, 1].
        logarithmic: compare the logarithms of the sizes. ``least_spread`` is then a difference of logarithms.
        seed: seed of the search.
    """

    search: InvertSettings = CLEANSING
    threshold: float = 2.0
    least_spread: float = 0.1
    flip_rate: float = 0.75
    logarithmic: bool = False
    seed: int = 0

    id = "bdprune.neural_cleanse"
    title = "finds a label with an outlying size of its trigger"
    paper = "Wang et al., Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks, S&P 2019"
    needs = Needs(images="labelled", minimum=20)
    cost: ClassVar[Cost] = "gradients"
    gives = ("detection", "trigger recovery")
    label = True
    sign: ClassVar[Sign] = "trigger"
    level = None
    rule = InversionDetector.rule
    presets = PRESETS

    def steps(self, case: Case) -> Steps:
        """Searches a trigger for every label, and compares their sizes.

        Raises:
            DataError: there are no clean images, or too few.
        """
        self.check(case)
        return self._evidence(case, (yield self.triggers(case)))

    def triggers(self, case: Case) -> Triggers:
        """The analysis that searches a trigger for every label."""
        limit = case.budget.share(_SEARCHING)
        labels = tuple(Hypothesis(label) for label in range(case.model.num_classes))
        return Triggers(self.search, hypotheses=labels, seed=self.seed, seconds=limit)

    def work(self, case: Case) -> float:
        """The first stage for every label."""
        first = self.search.stages[0]
        return 2.0 * case.model.num_classes * first.steps * first.images

    def _evidence(self, case: Case, inversion: Inversion) -> Evidence:
        found = inversion.recoveries
        whole = float(math.prod(case.model.input_shape[1:]))
        indices = self._indices([min(one.size, whole) for one in found])
        score, best = most_outstanding(zip(indices, found, strict=True), self.threshold, self.flip_rate)
        worked = works(best, self.flip_rate)
        label = best.hypothesis.target
        assert label is not None
        scores: list[float | None] = [None] * case.model.num_classes
        for index, one in zip(indices, found, strict=True):
            scores[one.hypothesis.target or 0] = index
        blank = why_no_outlier(case.model.num_classes)
        infos, attached = attach_triggers(case, *([best.trigger] if math.isfinite(best.size) else []))
        return self.evidence(
            0.0 if blank else score if worked else min(score, self.threshold),
            self.threshold,
            target_label=label if score > self.threshold and worked and not blank else None,
            label_scores=tuple(scores),
            remarks=(_remark(best, score, worked),),
            limits=few_labels(case.model.num_classes),
            unseen=unseen_by([inversion]),
            not_applicable=blank,
            details={
                "label": label,
                "sizes": {str(one.hypothesis.target): one.size for one in found},
                "image_steps": inversion.image_steps,
            },
            triggers=infos,
            attachments=attached,
        )

    def _indices(self, sizes: Sequence[float]) -> list[float]:
        if self.logarithmic:
            return anomaly_indices([math.log(max(size, _SMALLEST)) for size in sizes], self.least_spread)
        return anomaly_indices(sizes, self.least_spread * statistics.median(sizes))


def anomaly_indices(sizes: Sequence[float], least: float) -> list[float]:
    """Distance of each size below the median in units of MAD, at most 100; negative above the median.

    Args:
        sizes: one for each label, finite.
        least: smallest MAD.
    """
    middle = statistics.median(sizes)
    scale = max(_SCALE * statistics.median(abs(size - middle) for size in sizes), least, 1e-6)
    return [max(-_LARGEST, min(_LARGEST, (middle - size) / scale)) for size in sizes]


def _remark(best: Recovery, score: float, worked: bool) -> str:
    if not math.isfinite(best.size):
        return "No trigger flips most images."
    trigger = best.trigger
    rate = 0.0 if trigger.flip_rate is None else trigger.flip_rate
    remark = (
        f"The smallest trigger leads to label {trigger.target}, has a size of {best.size:.1f} pixels and the anomaly "
        f"index {score:.1f}, and flips {rate:.0%} of {trigger.images} held-out images."
    )
    return remark if worked else f"{remark} It flips too few of them to count."
