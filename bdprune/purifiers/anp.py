"""Adversarial Neuron Pruning (Wu and Wang, NeurIPS 2021): prune filters that noise on the weights can misuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from bdprune.analysis import Case
from bdprune.data import CleanData
from bdprune.loops import AdversarialMaskSettings, Sweep, SweepPoint, SweepSettings, learn_masks, sweep
from bdprune.methods import CurvePoint, Phases, Purifier, Repair, hold_out
from bdprune.model import Model, PruneMode, prune
from bdprune.record import Needs, check_settings, check_shares
from bdprune.runtime import DEFAULT, Precision


@dataclass(frozen=True)
class ANP(Purifier):
    """Learns one mask for each filter under adversarial noise on the filters, and prunes filters with low masks.

    The paper prunes below a fixed threshold. How many filters that removes depends on the network and on the number of
    updates, so the default takes the highest threshold that keeps the clean accuracy.

    Args:
        masking: settings of the masks.
        threshold: prune filters with masks at or below it, in [0, 1], whatever it costs; None to choose it.
        max_drop: largest fall of clean accuracy that a chosen threshold may cause, in [0, 1], on the held-out images.
        held_out: share of the clean images held out for choosing the threshold.
        strict: limit the fall on the other clean images as well. A few held-out images let a threshold pass by chance
            if twenty are tried.
        step: distance between the thresholds that are tried, from 0 to 0.95.
        mode: how a filter is pruned; the paper zeroes gamma.
        precision: precision of the masks (:func:`bdprune.runtime.plan_for`).
        seed: seed for the split, the noise, the order and the augmentation.
    """

    masking: AdversarialMaskSettings = field(
        default_factory=lambda: AdversarialMaskSettings(iterations=150, batch_size=64, averaged=0.5)
    )
    threshold: float | None = None
    max_drop: float = 0.02
    held_out: float = 0.3
    strict: bool = True
    step: float = 0.05
    mode: PruneMode = "zero_gamma"
    precision: Precision = DEFAULT
    seed: int = 0

    id = "bdprune.anp"
    title = "learns one mask for each filter under adversarial noise, prunes filters with low masks"
    paper = "Wu and Wang, Adversarial Neuron Pruning Purifies Backdoored Deep Models, NeurIPS 2021, arXiv 2110.14430"
    needs = Needs(images="labelled", minimum=2)
    cost = "training"
    threshold_name = "threshold"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"masking": AdversarialMaskSettings(small_data=0), "threshold": 0.2},
        "robust": {},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, above={"step": 0})
        check_shares(self, ["threshold"])

    def __call__(self, case: Case) -> Repair:
        """Repairs a copy of the model; a share of the images is held out for the threshold.

        Raises:
            DataError: there are no clean images, or no class has an image to hold out.
            TrainingError: a loss of the masks is not finite.
        """
        self.check(case)
        rest, held = hold_out(case.images, self.held_out, self.seed)
        phase = Phases()
        with phase("masks"):
            masks = learn_masks(case.model, rest, self.masking, self.seed, self.precision).masks
        with phase("sweep"):
            swept, chosen = self._choose(case.model, masks, rest, held)
        pruned = chosen.pruned if chosen else {}
        return self.repair(
            case,
            prune(case.model, pruned, self.mode),
            held,
            pruned=pruned,
            selection=self._selection(chosen, len(held), len(rest)),
            masks=masks,
            threshold=chosen.threshold if chosen else float("nan"),
            curve=tuple(CurvePoint(p.threshold, p.clean_accuracy, p.filters_pruned) for p in swept.points),
            seconds=phase.seconds,
            attachments=(case.attach("masks", masks),),
        )

    def _choose(
        self, model: Model, masks: Mapping[str, Tensor], rest: CleanData, held: CleanData
    ) -> tuple[Sweep, SweepPoint | None]:
        """The sweep, and the given threshold or the highest one within the limit."""
        tried = [index * self.step for index in range(round(0.95 / self.step) + 1)]
        thresholds = tried if self.threshold is None else [self.threshold]
        sets = (held, rest) if self.strict else (held,)
        limit = self.max_drop if self.threshold is None else 1.0
        swept = sweep(model, masks, sets, SweepSettings(thresholds, limit, self.mode, False, limit), self.precision)
        return swept, swept.highest(limit)

    def _selection(self, chosen: SweepPoint | None, held: int, rest: int) -> str:
        where = f"{held} held-out images" + (f" and on the other {rest}" if self.strict else "")
        cost = f"{100 * self.max_drop:g} points on {where}"
        if chosen is None:
            return f"nothing is pruned: every threshold costs more than {cost}"
        if not chosen.pruned:
            return f"nothing is pruned: no mask is at or below {chosen.threshold:g}"
        return "given threshold" if self.threshold is not None else f"highest threshold that costs at most {cost}"
