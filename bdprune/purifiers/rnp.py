"""Reconstructive Neuron Pruning (Li et al., ICML 2023): unlearn, recover a mask, prune by a dynamic threshold."""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass, field
from typing import Self

import torch

from bdprune.data import CleanData
from bdprune.errors import DataError, OptionError
from bdprune.loops import (
    FineTuneSettings,
    RecoverSettings,
    UnlearnSettings,
    fine_tune,
    recover,
    sink_label,
    sweep_thresholds,
    unlearn,
)
from bdprune.methods import CurvePoint, Purified
from bdprune.model import Model, PruneMode, prune
from bdprune.runtime import DEFAULT, Precision, clean_accuracy

_PRESETS = {
    "paper": (
        UnlearnSettings(momentum=0.9, weight_decay=5e-2, stop_accuracy=0.1, stop_on="epoch", small_data=0, retries=0),
        RecoverSettings(small_data=0),
    ),
    "code": (
        UnlearnSettings(
            weight_decay=5e-4,
            max_epochs=21,
            stop_accuracy=0.2,
            stop_on="epoch",
            milestones=(10, 20),
            small_data=0,
            retries=0,
        ),
        RecoverSettings(loss_scale=0.2, small_data=0),
    ),
    "robust": (
        # Half-way is far enough: the backdoor's filters are the first to move, and the deeper the network falls, the
        # more filters it takes to bring it back (docs/detection.md).
        UnlearnSettings(weight_decay=5e-4, stop_share=0.6, min_steps=8, raises=1),
        RecoverSettings(loss_scale=0.2),
    ),
}


@dataclass(frozen=True)
class RNP:
    """Unlearns a copy, recovers it with a mask over filters, and prunes the original where the mask stayed low.

    Args:
        unlearning: settings of the ascent.
        recovery: settings of the mask.
        max_drop: largest fall of clean accuracy that the threshold may cost, in [0, 1], on the held-out clean images.
        held_out: share of the clean images that is kept for choosing the threshold.
        strict: the fall must not be larger on the other clean images either. A handful of held-out images lets a
            threshold through by luck when twenty are tried.
        stop_early: raise the threshold until the drop is too large for the first time (the paper's dynamic threshold);
            otherwise try all and take the highest that keeps it.
        step: distance between the thresholds that are tried, from 0 to 0.95.
        fine_tuning: settings of a fine-tuning that keeps the pruned filters pruned (RNP, Table 12: "+FT"), done only
            where no threshold keeps ``max_drop``: it wakes backdoors, so it is not done for nothing. None for never.
        tuned_drop: largest fall before such a fine-tuning, which is trusted to bring it back.
        mode: how a filter is pruned; the paper zeroes gamma.
        precision: of unlearning, recovery and fine-tuning: ``winograd``, float32 with 3x3 convolutions that round about
            twice as coarsely as PyTorch's and are twice as fast on a CPU; ``float32``, what PyTorch computes;
            ``bfloat16``; or ``auto``, the fastest on this machine by a short trial.
        seed: of the split, the order and the augmentation.
    """

    unlearning: UnlearnSettings = field(default_factory=lambda: _PRESETS["robust"][0])
    recovery: RecoverSettings = field(default_factory=lambda: _PRESETS["robust"][1])
    max_drop: float = 0.02
    held_out: float = 0.3
    strict: bool = True
    stop_early: bool = False
    step: float = 0.05
    fine_tuning: FineTuneSettings | None = field(default_factory=lambda: FineTuneSettings(lr=0.005, epochs=10))
    tuned_drop: float = 0.08
    mode: PruneMode = "zero_gamma"
    precision: Precision = DEFAULT
    seed: int = 0

    id = "bdprune.rnp"

    @classmethod
    def preset(cls, name: str, **settings: object) -> Self:
        """RNP by the ``paper``'s appendix, by the authors' ``code``, or the ``robust`` default.

        Raises:
            OptionError: an unknown name.
        """
        if name not in _PRESETS:
            raise OptionError(f"There is no RNP preset {name!r}.", f"Choose one of {', '.join(_PRESETS)}.")
        unlearning, recovery = _PRESETS[name]
        published = {} if name == "robust" else {"strict": False, "stop_early": True, "fine_tuning": None}
        return cls(unlearning=unlearning, recovery=recovery, **{**published, **settings})  # type: ignore[arg-type]

    def __call__(self, model: Model, data: CleanData) -> Purified:
        """Repairs a copy of ``model`` with ``data``, of which a share is held out for the threshold.

        Raises:
            DataError: no class has an image to spare for that.
        """
        clock = [time.perf_counter()]
        rest, held = data.split(self.held_out, torch.Generator().manual_seed(self.seed))
        if not len(held):
            raise DataError(
                f"{len(data)} clean images, one of each class, leave none to choose a threshold on.",
                "Give at least two of a class, or use the method suspiciousness.",
            )
        unlearned = unlearn(model, rest, self.unlearning, self.seed, self.precision)
        clock.append(time.perf_counter())
        masks = recover(unlearned.model, rest, self.recovery, self.seed, self.precision).masks
        clock.append(time.perf_counter())
        thresholds = [index * self.step for index in range(round(0.95 / self.step) + 1)]
        sets = (held, rest) if self.strict else (held,)
        hopeless = max(self.max_drop, self.tuned_drop)
        sweep = sweep_thresholds(
            model,
            masks,
            sets,
            thresholds,
            self.max_drop,
            self.mode,
            self.stop_early,
            hopeless,
            precision=self.precision,
        )
        chosen = sweep.highest(self.max_drop)
        tuning = self.fine_tuning if chosen is None else None
        if tuning:
            chosen = sweep.highest(self.tuned_drop)
        pruned = chosen.pruned if chosen else {}
        repaired = prune(model, pruned, self.mode)
        clock.append(time.perf_counter())
        if tuning and pruned:
            repaired = fine_tune(repaired, rest, tuning, pruned, self.mode, self.seed, self.precision)
        clock.append(time.perf_counter())
        return Purified(
            model=repaired,
            method=self.id,
            pruned=pruned,
            num_filters=sum(map(len, masks.values())),
            masks=masks,
            threshold=chosen.threshold if chosen else float("nan"),
            threshold_rule=self._rule(chosen is not None, tuning is not None, len(held), len(rest)),
            accuracy_before=sweep.accuracy_before,
            accuracy_after=clean_accuracy(repaired.module, held.images, held.labels),
            curve=tuple(CurvePoint(p.threshold, p.clean_accuracy, p.filters_pruned) for p in sweep.points),
            target_label=sink_label(unlearned.trajectory, unlearned.steps_per_epoch),
            unlearned=unlearned.model,
            seconds=dict(zip(("unlearn", "recover", "sweep", "fine_tune"), _laps(clock), strict=True)),
            params=asdict(self),
        )

    def _rule(self, found: bool, tuned: bool, held: int, rest: int) -> str:
        drop = self.tuned_drop if tuned else self.max_drop
        where = f"{held} held-out images" + (f" and on the other {rest}" if self.strict else "")
        if not found:
            return f"nothing is pruned: every threshold costs more than {100 * drop:g} points on {where}"
        return f"highest that costs at most {100 * drop:g} points on {where}" + (", then fine-tuned" if tuned else "")


def _laps(clock: list[float]) -> list[float]:
    return [end - start for start, end in itertools.pairwise(clock)]
