"""Prunes the filters that the recovered triggers of a case raise most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bdprune.analysis import Case, Outstanding, excess_flips, raised_filters
from bdprune.data import CleanData
from bdprune.errors import ArchitectureError
from bdprune.loops import FineTuneSettings, KeptPruned, PrunedPredictions, Pruning, fine_tune
from bdprune.methods import CurvePoint, Phases, Repair, TriggerPurifier, hold_out, sure_drop
from bdprune.model import Model, PruneMode, last_group, prune
from bdprune.record import Needs
from bdprune.runtime import DEFAULT, Precision, share_right, within

_LOOKS = 200
"""The number of images that rank the filters."""

_SHARES = (0.0025, 0.005, 0.0075, 0.01, 0.0133, 0.0167, 0.02, 0.025, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.125, 0.15)
"""The tried shares of all filters."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {"layers": "last", "stop": "flips", "max_drop": 1.0, "fine_tuning": None, "mode": "zero_gamma_beta"},
    "robust": {},
}


@dataclass(frozen=True)
class _Point:
    """What one pruning does.

    Attributes:
        filters: number of pruned filters.
        accuracies: clean accuracy on the held-out and on the other images, in [0, 1].
        flips: largest share of held-out images that a trigger flips, in [0, 1].
    """

    filters: int
    accuracies: tuple[float, float]
    flips: float

    def drop(self, first: _Point) -> float:
        """Fall of the accuracy since ``first``, the larger one of both sets. Held-out images alone are few."""
        return max(before - after for before, after in zip(first.accuracies, self.accuracies, strict=True))


@dataclass(frozen=True)
class TriggerPruning(TriggerPurifier):
    """Prunes the filters that recovered triggers raise most, as far as clean accuracy allows.

    A filter's rank is the rise of its map under a trigger, in standard deviations on clean images
    (:func:`bdprune.analysis.raised_filters`); of several triggers the largest rise counts. A recovered trigger is
    weaker than the true one, so the default does not stop when the recovered one stops working: it prunes as many
    filters as held-out clean accuracy allows. If the trigger still works then, more filters are pruned, and a
    fine-tuning that keeps them pruned must regain the accuracy.

    The preset ``paper`` is the patching of Neural Cleanse: it ranks the neurons of the last layer only, sets those that
    it prunes to zero, and stops when the recovered trigger no longer works. Unlike there, the search is that of a scan,
    and rises are counted in standard deviations.

    Args:
        search: which triggers are searched; by default those of a scan.
        least: smallest score of a trigger that counts (:class:`bdprune.detectors.inversion.InversionDetector`).
        layers: rank the filters of ``all`` layers, or of the ``last`` one.
        stop: prune as long as the ``accuracy`` allows, or until the triggers no longer work (``flips``), and not beyond
            the accuracy either.
        gone: largest share of held-out images that a trigger without effect flips beyond those that the network labels
            so without it, in [0, 1].
        max_drop: largest fall of clean accuracy on the held-out images, and on the others, in [0, 1].
        held_out: share of the clean images held out for the accuracy.
        fine_tuning: settings of the fine-tuning; None for none.
        tuned_drop: largest fall of clean accuracy before the fine-tuning.
        regained_drop: largest fall of clean accuracy after the fine-tuning, less its standard error, on the held-out
            images (:func:`bdprune.methods.sure_drop`); with a larger one the pruning within ``max_drop`` is the result,
            without fine-tuning.
        mode: how a filter is pruned.
        precision: precision of the fine-tuning (:func:`bdprune.runtime.plan_for`).
        seed: seed of the search, of the split and of the fine-tuning.
    """

    layers: Literal["all", "last"] = "all"
    stop: Literal["accuracy", "flips"] = "accuracy"
    gone: float = 0.1
    max_drop: float = 0.02
    held_out: float = 0.3
    fine_tuning: FineTuneSettings | None = field(default_factory=lambda: FineTuneSettings(lr=0.005, epochs=10))
    tuned_drop: float = 0.08
    regained_drop: float = 0.04
    mode: PruneMode = "zero_gamma"
    precision: Precision = DEFAULT

    id = "bdprune.trigger_pruning"
    title = "prunes the filters that the recovered triggers raise most"
    paper = "after Wang et al., Neural Cleanse, S&P 2019, Section VI.B (patching by neuron pruning)"
    needs = Needs(images="labelled", minimum=20)
    cost = "gradients"
    gives = ("removal", "trigger recovery")
    label = True
    limits = "It removes backdoors whose trigger the search recovers. Without such a trigger it changes nothing."
    presets = PRESETS

    def repaired(self, case: Case, known: Sequence[Outstanding], phase: Phases) -> Repair:
        """The repair by known triggers.

        Args:
            case: the case; its model may be another form of the network that the triggers come from.
            known: the triggers; without any, nothing is pruned.
            phase: takes the times.
        """
        rest, held = hold_out(case.images, self.held_out, self.seed)
        if not case.model.groups:
            raise ArchitectureError(f"{self.id} needs convolutions, and the network has none.", "Use another method.")
        if not known:
            nothing = "nothing is pruned: no recovered trigger stands out"
            return self.repair(case, case.model, held, selection=nothing, seconds=phase.seconds)
        with phase("rank"):
            ranks = self._ranks(case.model, known, rest)
        with phase("sweep"):
            points, prunings = self._tried(case.model, known, ranks, (held, rest))
            chosen, tuned = self._choose(points)
        repaired = prune(case.model, prunings[chosen], self.mode)
        with phase("fine_tune"):
            if tuned and self.fine_tuning:
                kept = KeptPruned(prunings[chosen], self.mode)
                repaired = fine_tune(repaired, rest, self.fine_tuning, kept, self.seed, self.precision)
                if not within(sure_drop(case.model, repaired, held), self.regained_drop):
                    chosen, tuned = self._furthest(points, self.max_drop), False
                    repaired = prune(case.model, prunings[chosen], self.mode)
        return self.repair(
            case,
            repaired,
            held,
            pruned={name: list(index) for name, index in prunings[chosen].items()},
            retrained=tuned,
            selection=self._selection(known, chosen, len(held), tuned),
            masks=ranks,
            curve=tuple(CurvePoint(float(one.filters), one.accuracies[0], one.filters) for one in points),
            target_label=known[0].trigger.target,
            seconds=phase.seconds,
            attachments=(case.attach("filter_scores", ranks),),
        )

    def _ranks(self, model: Model, known: Sequence[Outstanding], data: CleanData) -> dict[str, Tensor]:
        """Group name -> rise of each filter under the trigger that raises it most, ``[num_filters]``."""
        few = data.spread(_LOOKS)
        ranked = []
        for one in known:
            own = one.trigger.takes(few.labels)
            ranked.append(raised_filters(model, one.trigger, few.images[own] if own.any() else few.images))
        ranks = {name: torch.stack([one[name] for one in ranked]).amax(0) for name in ranked[0]}
        if self.layers == "last":
            last = last_group(model.groups).name
            return {last: ranks[last]}
        return ranks

    def _tried(
        self,
        model: Model,
        known: Sequence[Outstanding],
        ranks: Mapping[str, Tensor],
        sets: tuple[CleanData, CleanData],
    ) -> tuple[list[_Point], list[Pruning]]:
        """The tried prunings, of which the first is none, and what each does on the held-out and the other images."""
        held, rest = sets
        filters = sum(map(len, ranks.values()))
        counts = [0, *sorted({max(round(share * filters), 1) for share in self._shares})]
        prunings: list[Pruning] = [highest(ranks, count) for count in counts]
        taken = [one.trigger.takes(held.labels) for one in known]
        stamped = [one.trigger.apply(held.images[own]) for one, own in zip(known, taken, strict=True)]
        predictions = PrunedPredictions(model, (held.images, rest.images, *stamped), prunings, self.mode)
        points: list[_Point] = []
        for step, count in enumerate(counts):
            clean = predictions.predict(step, 0)
            flips = [
                excess_flips(one.trigger, clean[own], predictions.predict(step, place), held.labels[own])
                for place, (one, own) in enumerate(zip(known, taken, strict=True), 2)
            ]
            accuracies = share_right(clean, held.labels), share_right(predictions.predict(step, 1), rest.labels)
            points.append(_Point(count, accuracies, max(flips)))
            if points[-1].drop(points[0]) > max(self.max_drop, self.tuned_drop) + 0.1:
                break
        return points, prunings

    @property
    def _shares(self) -> tuple[float, ...]:
        if self.layers == "all":
            return _SHARES
        return tuple(step / 40 for step in range(1, 40))

    def _choose(self, points: Sequence[_Point]) -> tuple[int, bool]:
        """Index of the chosen pruning, and whether a fine-tuning must follow."""
        within = self._furthest(points, self.max_drop)
        if self.fine_tuning is None or points[within].flips <= self.gone:
            return within, False
        further = self._furthest(points, self.tuned_drop)
        return (further, True) if further > within else (within, False)

    def _furthest(self, points: Sequence[_Point], drop: float) -> int:
        """The last pruning before the accuracy first falls too far; with ``flips`` the first that ends the flips."""
        reached = 0
        for place, point in enumerate(points):
            if not within(point.drop(points[0]), drop):
                break
            reached = place
            if self.stop == "flips" and point.flips <= self.gone:
                break
        return reached

    def _selection(self, known: Sequence[Outstanding], chosen: int, held: int, tuned: bool) -> str:
        names = ", ".join(one.name for one in known)
        drop = self.tuned_drop if tuned else self.max_drop
        bound = f"{100 * drop:g} points on {held} held-out images and on the others"
        if not chosen:
            return f"nothing is pruned: even the first filters raised by the triggers ({names}) cost more than {bound}"
        end = ", then fine-tuned" if tuned else ""
        if self.stop == "flips":
            return f"filters raised by the triggers ({names}), until they no longer work, at most {bound}{end}"
        return f"as many filters raised by the triggers ({names}) as cost at most {bound}{end}"


def highest(ranks: Mapping[str, Tensor], count: int) -> dict[str, list[int]]:
    """The filters with the ``count`` highest ranks of all groups, by group name, indices in increasing order."""
    owner = [(name, index) for name, value in ranks.items() for index in range(len(value))]
    order = torch.cat(list(ranks.values())).argsort(descending=True, stable=True)[:count].tolist()
    found: dict[str, list[int]] = {}
    for place in sorted(order):
        found.setdefault(owner[place][0], []).append(owner[place][1])
    return found
