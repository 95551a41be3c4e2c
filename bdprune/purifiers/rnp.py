"""Reconstructive Neuron Pruning (Li et al., ICML 2023): unlearn, recover a mask, prune by a dynamic threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from bdprune.analysis import SCAN_UNLEARNING, Case, Unlearning
from bdprune.data import CleanData
from bdprune.loops import (
    FineTuneSettings,
    KeptPruned,
    RecoverSettings,
    Sweep,
    SweepPoint,
    SweepSettings,
    Unlearned,
    UnlearnSettings,
    fine_tune,
    recover,
    sink_label,
    sweep,
)
from bdprune.methods import CurvePoint, Phases, Purifier, Repair, hold_out, sure_drop
from bdprune.model import Model, PruneMode, prune
from bdprune.record import Needs, check_settings
from bdprune.runtime import DEFAULT, Precision, within

_PUBLISHED: dict[str, Any] = {"strict": False, "stop_early": True, "fine_tuning": None}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "unlearning": UnlearnSettings(
            momentum=0.9, weight_decay=5e-2, stop_accuracy=0.1, stop_on="epoch", small_data=0, retries=0
        ),
        "recovery": RecoverSettings(small_data=0),
        **_PUBLISHED,
    },
    "code": {
        "unlearning": UnlearnSettings(
            weight_decay=5e-4,
            max_epochs=21,
            stop_accuracy=0.2,
            stop_on="epoch",
            milestones=(10, 20),
            small_data=0,
            retries=0,
        ),
        "recovery": RecoverSettings(loss_scale=0.2, small_data=0),
        **_PUBLISHED,
    },
    "robust": {
        # Half-way is deep enough: the backdoor's filters move first, and a more degraded network needs more filters to
        # recover (docs/explanation/unlearning.md).
        "unlearning": UnlearnSettings(weight_decay=5e-4, stop_share=0.6, min_steps=8, raises=1),
        "recovery": RecoverSettings(loss_scale=0.2),
    },
    # Reuses the model of a scan, which unlearns on all images down to chance. Half-way is deep enough, as in "robust".
    "scan": {
        "unlearning": SCAN_UNLEARNING,
        "recovery": RecoverSettings(loss_scale=0.2),
        "unlearn_on": "all",
        "depth": "half_way",
    },
}


@dataclass(frozen=True)
class RNP(Purifier):
    """Unlearns a copy, recovers it with a mask over filters, and prunes the filters of the original with low masks.

    Args:
        unlearning: settings of the ascent.
        recovery: settings of the mask.
        unlearn_on: ``rest`` unlearns on the images that are not held out; ``all`` on all images, so that the unlearning
            of a scan with the same settings can be reused (preset ``scan``).
        depth: recover the model at the ``end`` of the unlearning, or the saved model ``half_way``.
        max_drop: largest fall of clean accuracy that the threshold may cause, in [0, 1], on the held-out clean images.
        held_out: share of the clean images held out for choosing the threshold.
        strict: limit the fall on the other clean images as well. A few held-out images let a threshold pass by chance
            if twenty are tried.
        stop_early: raise the threshold until the fall first exceeds the limit (the paper's dynamic threshold);
            otherwise try all thresholds and take the highest within the limit.
        step: distance between the thresholds, from 0 to 0.95.
        fine_tuning: settings of a fine-tuning that keeps the pruned filters pruned (RNP, Table 12: "+FT"), used only if
            no threshold keeps ``max_drop``, because fine-tuning can restore backdoors. None for never.
        tuned_drop: largest fall of clean accuracy before the fine-tuning.
        regained_drop: largest fall of clean accuracy after the fine-tuning, less its standard error, on the held-out
            images (:func:`bdprune.methods.sure_drop`); with a larger one nothing is pruned.
        mode: how a filter is pruned; the paper zeroes gamma.
        precision: precision of unlearning, recovery and fine-tuning: ``winograd``, float32 with 3x3 convolutions with
            about twice PyTorch's rounding errors and twice its speed on a CPU; ``float32``, plain PyTorch;
            ``bfloat16``; or ``auto``, the fastest on this machine in a short trial.
        seed: seed for the split, the order and the augmentation.
    """

    unlearning: UnlearnSettings = field(default_factory=lambda: PRESETS["robust"]["unlearning"])
    recovery: RecoverSettings = field(default_factory=lambda: PRESETS["robust"]["recovery"])
    unlearn_on: Literal["rest", "all"] = "rest"
    depth: Literal["end", "half_way"] = "end"
    max_drop: float = 0.02
    held_out: float = 0.3
    strict: bool = True
    stop_early: bool = False
    step: float = 0.05
    fine_tuning: FineTuneSettings | None = field(default_factory=lambda: FineTuneSettings(lr=0.005, epochs=10))
    tuned_drop: float = 0.08
    regained_drop: float = 0.04
    mode: PruneMode = "zero_gamma"
    precision: Precision = DEFAULT
    seed: int = 0

    id = "bdprune.rnp"
    title = "unlearns the task, learns one mask for each filter, prunes filters with low masks"
    paper = "Li et al., Reconstructive Neuron Pruning for Backdoor Defense, ICML 2023, arXiv 2305.14876"
    needs = Needs(images="labelled", minimum=2)
    cost = "training"
    label = True
    gives = ("detection", "removal")
    presets = PRESETS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, above={"step": 0})

    def __call__(self, case: Case) -> Repair:
        """Repairs a copy of the model; a share of the images is held out for the threshold.

        Raises:
            DataError: there are no clean images, or no class has an image to hold out.
        """
        self.check(case)
        rest, held = hold_out(case.images, self.held_out, self.seed)
        part, phase = case.with_data(rest), Phases()
        unlearning = Unlearning(self.unlearning, self.seed, self.precision)
        with phase("unlearn"):
            unlearned = (case if self.unlearn_on == "all" else part).get(unlearning)
        with phase("recover"):
            fallen = self._fallen(unlearned)
            masks = recover(fallen, rest, self.recovery, self.seed, self.precision).masks
        with phase("sweep"):
            swept, chosen = self._choose(case.model, masks, rest, held)
        tuning = None
        if chosen is None and self.fine_tuning:
            chosen, tuning = _pruning(swept, self.tuned_drop), self.fine_tuning
        repaired = prune(case.model, chosen.pruned if chosen else {}, self.mode)
        with phase("fine_tune"):
            if chosen and tuning:
                kept = KeptPruned(chosen.pruned, self.mode)
                repaired = fine_tune(repaired, rest, tuning, kept, self.seed, self.precision)
                if not within(sure_drop(case.model, repaired, held), self.regained_drop):
                    repaired, chosen = case.model.clone(), None
        return self.repair(
            case,
            repaired,
            held,
            pruned=chosen.pruned if chosen else {},
            retrained=chosen is not None and tuning is not None,
            selection=self._selection(swept, chosen is not None, tuning is not None, (len(held), len(rest))),
            masks=masks,
            threshold=chosen.threshold if chosen else float("nan"),
            curve=tuple(CurvePoint(p.threshold, p.clean_accuracy, p.filters_pruned) for p in swept.points),
            target_label=sink_label(unlearned.trajectory, unlearned.steps_per_epoch),
            seconds=phase.seconds,
            params={**self.params, "depth": "end" if fallen is unlearned.model else "half_way"},
            attachments=(case.attach("masks", masks),),
        )

    def _fallen(self, unlearned: Unlearned) -> Model:
        """The unlearned model to recover; the repair records its depth."""
        half_way = unlearned.half_way if self.depth == "half_way" else None
        return half_way if half_way is not None else unlearned.model

    def _choose(
        self, model: Model, masks: Mapping[str, Tensor], rest: CleanData, held: CleanData
    ) -> tuple[Sweep, SweepPoint | None]:
        """The sweep, and its highest threshold within the limit that prunes a filter."""
        thresholds = [index * self.step for index in range(round(0.95 / self.step) + 1)]
        sets = (held, rest) if self.strict else (held,)
        hopeless = max(self.max_drop, self.tuned_drop)
        settings = SweepSettings(thresholds, self.max_drop, self.mode, self.stop_early, hopeless)
        swept = sweep(model, masks, sets, settings, self.precision)
        return swept, _pruning(swept, self.max_drop)

    def _selection(self, swept: Sweep, found: bool, tuned: bool, images: tuple[int, int]) -> str:
        drop = f"{100 * (self.tuned_drop if tuned else self.max_drop):g} points"
        where = f"on {images[0]} held-out images" + (f" and on the other {images[1]}" if self.strict else "")
        if found:
            return f"highest threshold that costs at most {drop} {where}" + (", then fine-tuned" if tuned else "")
        if not any(point.filters_pruned for point in swept.points):
            return "nothing is pruned: no threshold prunes a filter"
        if tuned and _pruning(swept, self.tuned_drop):
            limit = f"and after a fine-tuning still more than {100 * self.regained_drop:g}"
            return f"nothing is pruned: every threshold costs more than {100 * self.max_drop:g} points {where}, {limit}"
        return f"nothing is pruned: every threshold that prunes a filter costs more than {drop} {where}"


def _pruning(swept: Sweep, drop: float) -> SweepPoint | None:
    """The highest threshold within the limit; None if it prunes no filter."""
    chosen = swept.highest(drop)
    return chosen if chosen and chosen.filters_pruned else None
