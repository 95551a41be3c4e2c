"""Detects a label that the features of clean images reach with an unusually small shift."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bdprune.analysis import UNRESPONSIVE, Case, LatentFeatures, LatentMargins, why_no_outlier
from bdprune.methods import Detector, Steps
from bdprune.record import Needs, Rule

_NO_HEAD = "The network does not end in a linear layer, so it has no features to shift."


@dataclass(frozen=True)
class LatentMarginDetector(Detector):
    """Flags a model if one label needs a much smaller shift of the penultimate features than the others.

    For every label the smallest shift is computed that, added to the features of the clean images, makes the head name
    that label for nearly all of them (:func:`bdprune.analysis.latent_margins`). The score is the logarithm of the third
    smallest norm over the smallest, so that two labels that share a backdoor's features still count.

    Args:
        quantile: share of the images that the shift must move, in (0, 1].
        scaled: measure the shift of each feature in inverse units of its standard deviation, if every feature varies.
        threshold: a larger score is flagged (measurements: docs/evaluation/screens.md).
    """

    quantile: float = 0.99
    scaled: bool = True
    threshold: float = 0.3

    id = "bdprune.latent_margin"
    title = "finds a label that features reach with a small shift"
    paper = "after arXiv 2511.08944"
    needs = Needs(images="unlabelled", minimum=10)
    cost = "forward"
    label = True
    sign = "margin"
    level = None
    limits = (
        "It reads only the last layer. Backdoors with several targets, and those whose features mix with clean ones, "
        "stay below its threshold."
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {"quantile": 1.0, "scaled": False}}
    rule = Rule(
        id="BD060",
        name="easy-label",
        help="One label is far easier to reach than the others, as the target label of a backdoor is.",
    )

    def steps(self, case: Case) -> Steps:
        """Solves one small quadratic program for each label.

        Raises:
            DataError: there are no clean images, or too few.
        """
        self.check(case)
        latent = yield LatentFeatures()
        if latent is None or bool((latent.logits == latent.logits[0]).all()):
            return self.evidence(0.0, self.threshold, not_applicable=_NO_HEAD if latent is None else UNRESPONSIVE)
        margins = yield LatentMargins(self.quantile, self.scaled)
        known = margins[~margins.isnan()].sort().values.clamp(min=1e-9)
        blank = why_no_outlier(len(known))
        score = 0.0 if blank else math.log(known[2] / known[0])
        label = int(margins.nan_to_num(math.inf).argmin())
        return self.evidence(
            score,
            self.threshold,
            target_label=label if score > self.threshold else None,
            label_scores=tuple((known.median() / margins).log().tolist()) if len(known) else (),
            not_applicable=blank,
            details={"margins": margins.tolist()},
        )

    def work(self, case: Case) -> float:
        """One forward pass of every image."""
        return float(len(case.images))
