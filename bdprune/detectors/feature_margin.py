"""Detects a label whose margin grows furthest when the first feature maps are free (maximum margin, MM-BD)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bdprune.analysis import Case, gamma_p_values, promising_labels, robust_z, why_no_outlier, why_unresponsive
from bdprune.loops import MarginSettings, cut_at, largest_margins
from bdprune.methods import Detector
from bdprune.record import Evidence, Needs, Rule
from bdprune.runtime import FrozenNetworks, convs_of

_FEWEST_IMAGES, _FEWEST_LABELS = 2, 8
_MEGA = 1e6
_SMALLEST_P = 1e-300


@dataclass(frozen=True)
class FeatureMargin(Detector):
    """Flags a model if one label reaches a far larger margin than the others.

    For every label, gradient ascent on a few clean images raises the margin of its logit over the largest other logit.
    Not the pixels but the feature maps behind the first layers are free, so that the ascent needs no trigger that an
    image can hold. The largest margin of each label counts. A backdoor's label outgrows the others, because its logit
    was trained to win over any content. The score is the robust z-score of the largest among the labels.

    The published test fits a gamma distribution to all margins but the largest, and flags a p-value below 0.05. The
    preset ``paper`` does the same with ``test="gamma"``. The score is then ``-log10`` of the p-value. The authors fit
    three values of the distribution to nine margins; here it starts at 0 and two are fitted.
    With ten labels this test flags a quarter of all networks, even if all margins are of one gamma distribution.

    Args:
        search: settings of the ascent.
        depth: share of the convs before the maps that are free; 0 for the pixels, as in the paper.
        images: number of clean images; they need no labels.
        noise: start from random images instead.
        test: what the score is: the robust ``z`` of the largest margin, or the ``gamma`` test.
        threshold: a larger score is flagged (measurements: docs/evaluation/screens.md).
        max_megapixels: largest number of pixels of all images in all steps, in millions; above it, there are fewer
            images and labels, but at least two images and eight labels.
        seed: seed for the choice of images.
    """

    search: MarginSettings = field(default_factory=MarginSettings)
    depth: float = 0.05
    images: int = 6
    noise: bool = False
    test: Literal["z", "gamma"] = "z"
    threshold: float = 7.0
    max_megapixels: float = 10.0
    seed: int = 0

    id = "bdprune.feature_margin"
    title = "finds a label whose margin outgrows the others when the first feature maps are free"
    paper = (
        "Wang et al., MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary Backdoor Pattern Types Using a "
        "Maximum Margin Statistic, IEEE S&P 2024, arXiv 2205.06900"
    )
    needs = Needs(images="unlabelled")
    cost = "gradients"
    label = True
    sign = "margin"
    level = None
    limits = (
        "Backdoors with several targets, and backdoors that a warp or weak poison triggers, stay below its threshold."
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "search": MarginSettings(steps=300, lr=0.01, signed=False),
            "depth": 0.0,
            "images": 30,
            "noise": True,
            "test": "gamma",
            "threshold": -math.log10(0.05),
            "max_megapixels": float("inf"),
        }
    }
    rule = Rule(
        id="BD062",
        name="outgrowing-label",
        help="The margin of one label grows far beyond those of the others when the first feature maps are free.",
    )

    def __call__(self, case: Case) -> Evidence:
        """Raises the margin of every label, in batches.

        Raises:
            DataError: there are no clean images.
        """
        self.check(case)
        generator = torch.Generator().manual_seed(self.seed)
        images, labels = self._affordable(case, generator)
        networks = FrozenNetworks([case.model], images)
        if unresponsive := why_unresponsive(networks.logits, images.to(networks.device)):
            return self.evidence(0.0, self.threshold, not_applicable=unresponsive)
        with convs_of("winograd"):
            cut = cut_at(networks.module, images.to(networks.device), self.depth)
            margins = largest_margins(cut, labels, self.search)
        return self._read(case, margins, labels, cut.convs)

    def work(self, case: Case) -> float:
        """The fewest labels and images."""
        return 3.0 * _FEWEST_LABELS * _FEWEST_IMAGES * self.search.steps

    def _read(self, case: Case, margins: Tensor, labels: Tensor, convs: int) -> Evidence:
        """The evidence from the margins ``[len(labels), N]``."""
        classes, blank = case.model.num_classes, why_no_outlier(len(labels))
        largest = torch.full((classes,), torch.nan)
        largest[labels] = margins.amax(1)
        scores = self._scores(largest)
        finite = bool(margins.isfinite().all())  # else the score is NaN: the network was not examined
        score = 0.0 if blank else scores[labels].max().item() if finite else math.nan
        left_out = classes - len(labels)
        return self.evidence(
            score,
            self.threshold,
            target_label=int(scores.nan_to_num(-math.inf).argmax()) if score > self.threshold else None,
            label_scores=tuple(scores.tolist()),
            unseen=(f"{left_out} of {classes} labels",) if left_out else (),
            not_applicable=blank,
            details={"margins": largest.tolist(), "convs_before": convs, "images": margins.shape[1]},
        )

    def _scores(self, largest: Tensor) -> Tensor:
        """How far each margin stands out, ``[K]``; NaN where it is unknown."""
        if self.test == "z":
            return robust_z(largest)
        return gamma_p_values(largest).clamp(min=_SMALLEST_P).log10().abs()  # not -0.0 for a chance of 1

    def _affordable(self, case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The images and the labels that the number of pixels allows."""
        shape, classes = case.model.input_shape, case.model.num_classes
        rounds = self.max_megapixels * _MEGA / (shape[1] * shape[2] * self.search.steps)
        count = int(max(_FEWEST_IMAGES, min(self.images, rounds / classes)))
        labels = promising_labels(case, int(max(_FEWEST_LABELS, min(classes, rounds / count))))
        if self.noise:
            return torch.rand(count, *shape, generator=generator), labels
        unlabelled = replace(case.images, labels=torch.zeros_like(case.images.labels)).by_content
        return unlabelled.images[torch.randperm(len(unlabelled), generator=generator)[:count]], labels
