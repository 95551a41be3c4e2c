"""Suspiciousness pruning (arXiv 2311.07417): prune outlying filters with their batch norm, then fine-tune."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bdprune.analysis import Case, Suspiciousness, layer_z_scores
from bdprune.data import CleanData
from bdprune.loops import FineTuneSettings, KeptPruned, PrunedPredictions, Pruning, fine_tune
from bdprune.methods import CurvePoint, Phases, Purifier, Repair, accuracy_on, shifted_views
from bdprune.model import Model, PruneMode, prune
from bdprune.record import Needs
from bdprune.runtime import DEFAULT, Precision, convs_of, within

_LADDER = tuple(3.5 - 0.25 * step for step in range(11))  # 3.5 down to 1
_LOOKS = 500  # images on which each mu is tried, including views
_ENOUGH = 100  # images for the full learning rate of fine-tuning

Curve = tuple[CurvePoint, ...]


@dataclass(frozen=True)
class SuspiciousnessPruning(Purifier):
    """Prunes filters with score > mean + mu std of their layer, together with their norm, then fine-tunes.

    The paper does not give mu. By default, mu falls from 3.5 in steps of a quarter while clean accuracy, over several
    mirrored and shifted views of every image, drops by at most ``max_drop`` beyond its own sampling error. This is the
    one-standard-error rule (Breiman et al., 1984): ten images cannot distinguish a drop of 2 points from one of 10.

    Args:
        score: settings of the score.
        mu: number of standard deviations above its layer's mean at which a filter is pruned; None to choose it.
        max_drop: largest drop of clean accuracy, less one standard error, for a chosen mu before fine-tuning; in [0,
            1].
        max_share: largest share of a layer to prune; the highest scores go first.
        fine_tuning: settings of the fine-tuning; None for none. With fewer than 100 images its learning rate is scaled
            down with their number: a network that fits ten images closely forgets the rest.
        mode: how a filter is pruned; the paper also prunes its batch norm.
        precision: precision of trying mu and of the fine-tuning (:func:`bdprune.runtime.precision.plan_for`).
        seed: seed for the views, and for the fine-tuning's order and augmentation.
    """

    score: Suspiciousness = field(default_factory=Suspiciousness)
    mu: float | None = None
    max_drop: float = 0.02
    max_share: float = 0.1
    # Small steps, and running statistics for any number of images: batch norms that estimate new statistics on a few
    # clean images restore the backdoor (docs/explanation/suspiciousness.md).
    fine_tuning: FineTuneSettings | None = field(default_factory=lambda: FineTuneSettings(lr=1e-3, small_data=10_000))
    mode: PruneMode = "zero_gamma_beta"
    precision: Precision = DEFAULT
    seed: int = 0

    id = "bdprune.suspiciousness"
    title = "prunes filters with an outlying suspiciousness score in their layer, then fine-tunes"
    paper = "arXiv 2311.07417"
    needs = Needs(images="labelled")
    cost = "training"
    threshold_name = "mu"

    def __call__(self, case: Case) -> Repair:
        """Repairs a copy of the model. All images are used for scoring, fine-tuning and the accuracies reported.

        The fine-tuning is left out if it costs more than ``max_drop`` on the images that it learns from.

        Raises:
            DataError: there are no clean images.
        """
        self.check(case)
        model, data, phase = case.model, case.images, Phases()
        with phase("score"):
            scores = case.get(self.score)
        with phase("sweep"), convs_of(self.precision):
            mu, curve = (self.mu, ()) if self.mu is not None else self._choose(model, data, scores)
        pruned = outlying(scores, mu, self.max_share)
        repaired = prune(model, pruned, self.mode)
        tuning, rejected = self._small_steps(len(data)) if pruned else None, ""
        with phase("fine_tune"):
            if tuning:
                tuned = fine_tune(repaired, data, tuning, KeptPruned(pruned, self.mode), self.seed, self.precision)
                rejected = self._why_rejected(accuracy_on(repaired, data) - accuracy_on(tuned, data))
                repaired, tuning = (repaired, None) if rejected else (tuned, tuning)
        return self.repair(
            case,
            repaired,
            data,
            pruned=pruned,
            retrained=tuning is not None,
            selection=self._selection(mu, len(data)) + rejected,
            masks=scores,
            threshold=mu,
            curve=curve,
            seconds=phase.seconds,
            attachments=(case.attach("filter_scores", scores),),
        )

    def _choose(self, model: Model, data: CleanData, scores: Mapping[str, Tensor]) -> tuple[float, Curve]:
        """The lowest mu before the first that costs too much, NaN if there is none, and the curve of all tried."""
        views = shifted_views(data, max(_LOOKS // len(data), 1), self.seed)
        prunings: list[Pruning] = [{}, *(outlying(scores, mu, self.max_share) for mu in _LADDER)]
        predictions = PrunedPredictions(model, [views], prunings, self.mode)
        before = _hits(predictions.predict(0, 0), data.labels)
        chosen, drop = math.nan, torch.zeros(len(data))
        curve: list[CurvePoint] = []
        for step, mu in enumerate(_LADDER, 1):
            if prunings[step] != prunings[step - 1]:
                drop = before - _hits(predictions.predict(step, 0), data.labels)
            curve.append(CurvePoint(mu, float((before - drop).mean()), sum(map(len, prunings[step].values()))))
            if float(drop.mean()) - _standard_error(drop) > self.max_drop:
                break
            chosen = mu
        return chosen, tuple(reversed(curve))

    def _selection(self, mu: float, count: int) -> str:
        what = f"score > mean + {mu:g} std of its layer, at most {self.max_share:.0%} of a layer"
        bound = f"{100 * self.max_drop:g} points + one standard error on {count} clean images"
        if self.mu is not None:
            return what
        if math.isnan(mu):
            return f"nothing is pruned: no mu keeps {bound}"
        return f"{what}; lowest mu that keeps {bound}"

    def _why_rejected(self, drop: float) -> str:
        """Why the fine-tuning is left out, in a phrase; empty if it is not. It must not harm the images it learns."""
        if within(drop, self.max_drop):
            return ""
        return f"; the fine-tuning is left out, because it costs {100 * drop:.1f} points on the images that it learns"

    def _small_steps(self, count: int) -> FineTuneSettings | None:
        tuning = self.fine_tuning
        return tuning and replace(tuning, lr=tuning.lr * min(count / _ENOUGH, 1.0))


def outlying(scores: Mapping[str, Tensor], mu: float, max_share: float) -> dict[str, list[int]]:
    """Filters more than ``mu`` standard deviations above their layer's mean; groups without such filters are omitted.

    Args:
        scores: group name -> score per filter.
        max_share: largest share of a layer, in [0, 1], rounded down but never below one filter.
    """
    chosen = {}
    for name, z in layer_z_scores(scores).items():
        order = torch.argsort(z, descending=True, stable=True)
        order = order[: max(int(max_share * len(z)), 1)]
        index = sorted(order[z[order] > mu].tolist())
        if index:
            chosen[name] = index
    return chosen


def _hits(predicted: Tensor, labels: Tensor) -> Tensor:
    """Share of its views that is classified right, for every image ``[N]``; ``predicted`` is ordered view by view."""
    return (predicted.view(-1, len(labels)) == labels).double().mean(0)


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
