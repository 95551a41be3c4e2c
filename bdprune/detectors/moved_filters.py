"""Detects a label that the filters which unlearning changes most lead to, though the clean task does not need them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bdprune.analysis import (
    MOVED,
    RAISED_SHARES,
    RAISED_WEIGHT,
    SCAN_UNLEARNING,
    TWO_CLASS_MOVED,
    Case,
    PlainForm,
    RaisedPoint,
    Unlearning,
    easiest_label,
    for_few_labels,
    moved_filters,
    raise_moved,
    raised_counts,
)
from bdprune.data import CleanData
from bdprune.loops import UnlearnSettings
from bdprune.methods import NO_CONVS, Detector, Steps
from bdprune.record import Evidence, Needs, Rule
from bdprune.runtime import DEFAULT, Precision

_TYPICAL_STEPS = 25
"""Steps of the unlearning, for an estimate of its time; the detector ``unlearning`` has usually done them."""

_AT_THE_END = "No network half-way was kept, so filters are ranked at the end of the unlearning. Its scores differ."

_PASSES = 3
"""Forward passes of an image that take as long as its step of training."""


@dataclass(frozen=True)
class MovedFiltersDetector(Detector):
    """Flags a model if the filters that unlearning changes most send images to one label and are otherwise not needed.

    Unlearning changes the filters of a backdoor most (Lin et al., NeurIPS 2024). The detector takes the few filters of
    the original network whose weights change most up to half-way of the unlearning, and measures two things: the share
    of the images that go to each label if these filters are raised by one standard deviation, and the clean accuracy
    if they are pruned. In a backdoored network most images go to the target label, and pruning costs little. In a clean
    network the filters are those of its task, so pruning them costs much accuracy. The score is the share of flipped
    images minus ``weight`` times the lost accuracy, both relative (:func:`bdprune.analysis.easiest_label`).

    No trigger is searched, so the kind of the trigger does not matter. The unlearned model is the first one of the
    detector ``unlearning`` with the same settings.

    Args:
        unlearning: settings of the ascent.
        threshold: a larger score is flagged in a network of ten labels or more (measurements:
            docs/evaluation/candidates.md).
        weight: flips that equal the same share of lost accuracy.
        max_images: number of images for the measurements.
        precision: precision of the ascent (:func:`bdprune.runtime.plan_for`).
        seed: seed for order and augmentation of the ascent.
        two_class_threshold: the threshold for two labels (docs/evaluation/calibration.md). With few labels, more images
            go to each by chance (:func:`bdprune.analysis.for_few_labels`).
    """

    unlearning: UnlearnSettings = SCAN_UNLEARNING
    threshold: float = MOVED
    weight: float = RAISED_WEIGHT
    max_images: int = 250
    precision: Precision = DEFAULT
    seed: int = 0
    two_class_threshold: float = TWO_CLASS_MOVED

    id = "bdprune.moved_filters"
    title = "raises and prunes the filters that unlearning changes most"
    paper = "after Lin et al., Unlearning Weight Changes and Backdoor Activeness, NeurIPS 2024, arXiv 2405.20291"
    needs = Needs(images="labelled", minimum=100)
    cost = "training"
    label = True
    sign = "filters"
    level = "default"
    limits = (
        "It finds backdoors that lead all images to one label. Those with several targets, or whose filters the clean "
        "task needs too, stay below its threshold."
    )
    rule = Rule(
        id="BD070",
        name="unneeded-filters",
        help="A few filters that unlearning changes most send images to one label when they are raised, and the clean "
        "task hardly needs them.",
    )

    @property
    def batch_size(self) -> int:
        return self.unlearning.batch_size

    def steps(self, case: Case) -> Steps:
        """Unlearns a copy of the model, raises the filters that changed most, and prunes them.

        Raises:
            BudgetError: the time does not suffice for the unlearning.
            DataError: there are no clean images, or too few.
            TrainingError: the unlearning had no finite step.
        """
        self.check(case)
        if not case.model.groups:
            return self.evidence(0.0, self.threshold, not_applicable=NO_CONVS)
        unlearned = yield Unlearning(self.unlearning, self.seed, self.precision, plain=True)
        plain = yield PlainForm()
        half_way = unlearned.half_way
        ranked = moved_filters(plain, half_way or unlearned.model)
        points = raise_moved(plain, ranked, self._few(case), raised_counts(ranked))
        return self._evidence(points, () if half_way else (_AT_THE_END,))

    def work(self, case: Case) -> float:
        """The unlearning, and the forward passes."""
        images = min(self.unlearning.batch_size, len(case.images))
        forward = 2.0 * len(RAISED_SHARES) * min(self.max_images, len(case.images))
        return float(_TYPICAL_STEPS * images * _PASSES) + forward

    def _few(self, case: Case) -> CleanData:
        """Images of the case, the same share of every label."""
        if len(case.images) <= self.max_images:
            return case.images
        return case.images.split(self.max_images / len(case.images), torch.Generator().manual_seed(self.seed))[1]

    def _evidence(self, points: list[RaisedPoint], limits: tuple[str, ...] = ()) -> Evidence:
        score, label = easiest_label(points, self.weight)
        threshold = for_few_labels(len(points[0].flip_rates), self.threshold, self.two_class_threshold)
        reached = [max(values) for values in zip(*(one.flip_rates for one in points), strict=True)]
        return self.evidence(
            score,
            threshold,
            target_label=label if score > threshold else None,
            label_scores=tuple(reached),
            remarks=(_remark(points, label, self.weight),),
            limits=limits,
            details={"points": [(one.filters, one.clean_accuracy, one.flip_rates) for one in points]},
        )


def _remark(points: list[RaisedPoint], label: int | None, weight: float) -> str:
    first = points[0]
    if label is None:
        return "Raising the filters that unlearning changes most sends images to no label at a small cost."
    best = max(points[1:], key=lambda one: easiest_label([first, one], weight)[0])
    return (
        f"With {best.filters} filters raised, {best.flip_rates[label]:.0%} of the images of other labels go to label "
        f"{label}. With the same filters pruned, clean accuracy is {best.clean_accuracy:.1%} instead of "
        f"{first.clean_accuracy:.1%}."
    )
