"""DF-TND: a trigger that excites the features of a network without any image (Wang et al., ECCV 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bdprune.analysis import Case, robust_z, why_no_outlier, why_unresponsive
from bdprune.loops import ActivationSettings, raise_features
from bdprune.methods import Detector
from bdprune.model import find_head
from bdprune.record import Evidence, Needs, Rule
from bdprune.runtime import FrozenNetworks

_NO_HEAD = "The network does not end in a linear layer, so it has no penultimate features to raise."
_FEWEST_INPUTS = 2
_MEGA = 1e6


@dataclass(frozen=True)
class DfTnd(Detector):
    """Flags a model if a trigger that excites its features raises one logit far above the others.

    The trigger starts from random images and maximises a weighted sum of the penultimate features; the weights settle
    on the features that rise furthest. In a backdoored network those are the features of the trigger, and they raise
    the logit of the target label (:func:`bdprune.loops.raise_features`). The paper compares the rise with 100 logits.
    Here the score is the largest robust z-score of the rises among the labels, the median over independent restarts,
    so that one threshold fits networks with small and large logits.

    Args:
        search: settings of the ascent.
        inputs: number of random images of each restart.
        threshold: a larger score is flagged (measurements: docs/evaluation/screens.md).
        raw: the score is the largest rise in logits, as in the paper.
        max_megapixels: largest number of pixels of all images in all steps, in millions; above it, there are fewer
            images and restarts.
        seed: seed for the random images and the first triggers.
    """

    search: ActivationSettings = field(default_factory=ActivationSettings)
    inputs: int = 10
    threshold: float = 10.0
    raw: bool = False
    max_megapixels: float = 10.0
    seed: int = 0

    id = "bdprune.df_tnd"
    title = "finds a label that excited features raise, without any image"
    paper = "Wang et al., Practical Detection of Trojan Neural Networks, ECCV 2020, arXiv 2007.15802"
    needs = Needs(images="none", minimum=0)
    cost = "gradients"
    label = True
    sign = "perturbation"
    level = None
    limits = "A trigger that raises many features a little, as a warp or a sinus does, is no outlier."
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "search": ActivationSettings(alone_steps=1000, steps=1000, shared=False, restarts=1, decays=False),
            "threshold": 100.0,
            "raw": True,
            "max_megapixels": float("inf"),
        }
    }
    rule = Rule(
        id="BD061",
        name="excited-label",
        help="A pattern that excites the features of the network raises one logit far above the others, as a trigger "
        "does.",
    )

    def __call__(self, case: Case) -> Evidence:
        """Searches triggers on random images; ignores clean images."""
        model, head = case.model, find_head(case.model)
        if head is None:
            return self.evidence(0.0, self.threshold, not_applicable=_NO_HEAD)
        generator = torch.Generator().manual_seed(self.seed)
        search, inputs = self._affordable(model.input_shape)
        images = torch.rand(search.restarts * inputs, *model.input_shape, generator=generator)
        networks = FrozenNetworks([model], images)
        if unresponsive := why_unresponsive(networks.logits, images.to(networks.device)):
            return self.evidence(0.0, self.threshold, not_applicable=unresponsive)
        rises = raise_features(networks, head.path, images, search, generator)
        return self._read(rises, self._savings(search, inputs))

    def work(self, case: Case) -> float:
        """One restart on the fewest images."""
        return 3.0 * _FEWEST_INPUTS * (self.search.alone_steps + self.search.steps)

    def _read(self, rises: Tensor, limits: tuple[str, ...]) -> Evidence:
        """The evidence from the rises of the logits ``[restarts, K]``."""
        z = torch.stack([robust_z(one) for one in rises])
        blank = why_no_outlier(rises.shape[1])
        scores = (rises if self.raw else z).median(0).values  # of two restarts the lower one: both must agree
        score = 0.0 if blank else scores.max().item()
        return self.evidence(
            score,
            self.threshold,
            target_label=int(scores.argmax()) if score > self.threshold else None,
            label_scores=tuple(scores.tolist()),
            limits=limits,
            not_applicable=blank,
            details={"rises": rises.tolist(), "z": z.amax(1).tolist(), "labels": rises.argmax(1).tolist()},
        )

    def _affordable(self, shape: tuple[int, int, int]) -> tuple[ActivationSettings, int]:
        """The restarts and the images of each that the number of pixels allows."""
        search = self.search
        rounds = self.max_megapixels * _MEGA / (shape[1] * shape[2] * (search.alone_steps + search.steps))
        if search.restarts * self.inputs <= rounds:
            return search, self.inputs
        inputs = min(self.inputs, max(int(rounds / search.restarts), _FEWEST_INPUTS))
        return replace(search, restarts=max(1, min(search.restarts, int(rounds / inputs)))), inputs

    def _savings(self, search: ActivationSettings, inputs: int) -> tuple[str, ...]:
        if (search, inputs) == (self.search, self.inputs):
            return ()
        return (f"The images are large, so it used {inputs} random images and {search.restarts} restarts.",)
