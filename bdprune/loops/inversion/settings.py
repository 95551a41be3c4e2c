"""Settings and results of trigger inversion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from bdprune.errors import DataError, OptionError
from bdprune.loops.inversion.candidates import PenaltyRule
from bdprune.loops.inversion.hypotheses import Hypothesis
from bdprune.loops.inversion.trigger import Trigger
from bdprune.record import TriggerKind
from bdprune.runtime import DEFAULT, Precision


@dataclass(frozen=True)
class Stage:
    """Some steps of the search.

    Attributes:
        steps: number of steps.
        images: images of each hypothesis in a step.
        keep: number of hypotheses that take part, those with the smallest triggers so far; 0 for all.
    """

    steps: int
    images: int
    keep: int = 0


@dataclass(frozen=True)
class InvertSettings:
    """Settings of trigger inversion.

    Args:
        stages: the search; each stage continues with the smallest triggers of the one before (successive halving).
        final: repeated for the smallest triggers, until they flip ``flip_rate`` of the held-out images.
        rounds: maximum number of repetitions of ``final``; 0 leaves the triggers of the search.
        flip_rate: share of held-out images that a trigger should flip in the end.
        outstanding: ``final`` is left out if no trigger has a score of at least this
            (:func:`bdprune.loops.size_score`); 0 never leaves it out.
        success: share of the search's images that a trigger must flip to count as successful.
        lr: learning rate of Adam for patches.
        additive_lr: the same for additive triggers, whose variables are colours.
        warp_lr: the same for warps, whose variables are displacements.
        penalty: how the weight of the size follows the success.
        held_out: share of the clean images that the search never sees.
        only_right: search only with images that the model labels correctly. A model without its clean task, such as an
            unlearned one, needs all images.
        precision: precision of the forward and backward passes (:func:`bdprune.runtime.plan_for`).

    Raises:
        OptionError: there is no stage, or a number is outside its range.
    """

    stages: tuple[Stage, ...] = (Stage(60, 8), Stage(60, 16, keep=7))
    final: Stage = Stage(30, 32, keep=2)
    rounds: int = 3
    flip_rate: float = 0.9
    outstanding: float = 0.0
    success: float = 0.85
    lr: float = 0.3
    additive_lr: float = 0.03
    warp_lr: float = 0.1
    penalty: PenaltyRule = field(default_factory=PenaltyRule)
    held_out: float = 0.6
    only_right: bool = True
    precision: Precision = DEFAULT

    def lr_of(self, kind: TriggerKind) -> float:
        """The learning rate for triggers of this kind."""
        return {"patch": self.lr, "additive": self.additive_lr, "warp": self.warp_lr}[kind]

    @property
    def steps(self) -> int:
        """Steps of all stages, with all rounds of the final one."""
        return sum(stage.steps for stage in self.stages) + self.rounds * self.final.steps

    def __post_init__(self) -> None:
        counts = [value for stage in (*self.stages, self.final) for value in (stage.steps, stage.images)]
        if not self.stages or min(counts) < 1 or self.rounds < 0:
            raise OptionError(
                "Trigger inversion needs at least one stage, with at least 1 step of 1 image.", "Give larger numbers."
            )
        ranges = {
            "flip_rate": 0 < self.flip_rate <= 1,
            "outstanding": 0 <= self.outstanding < math.inf,
            "success": 0 < self.success < 1,
            "held_out": 0 < self.held_out < 1,
            "lr": 0 < self.lr < math.inf,
            "additive_lr": 0 < self.additive_lr < math.inf,
            "warp_lr": 0 < self.warp_lr < math.inf,
        }
        for name, fits in ranges.items():
            if not fits:
                raise OptionError(
                    f"The setting {name} of trigger inversion is out of range: {getattr(self, name)}.",
                    "Give a share between 0 and 1, or a learning rate above 0.",
                )


@dataclass(frozen=True, eq=False)
class Recovery:
    """The result of one hypothesis.

    Attributes:
        hypothesis: what was searched.
        size: size of the smallest trigger that was successful in the search, in pixels; infinite if none was.
        stages: number of stages that it took part in.
        trigger: its trigger; a larger and stronger one if it took part in the final stage. That of a weighted
            hypothesis is about its first source only.
        sources: for a weighted hypothesis at most four sources, the one that flips most easily first; else empty.
    """

    hypothesis: Hypothesis
    size: float
    stages: int
    trigger: Trigger
    sources: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Inversion:
    """The result of trigger inversion of one model.

    Attributes:
        recoveries: one for each hypothesis that was searched, in the given order.
        skipped: hypotheses that were not searched, because time was short or no image fits.
        image_steps: forward and backward passes of single images.
        seconds: wall time; of a stack, the share of this model.
        complete: whether all stages ran to their end.
    """

    recoveries: tuple[Recovery, ...]
    skipped: tuple[Hypothesis, ...] = ()
    image_steps: int = 0
    seconds: float = 0.0
    complete: bool = True

    @property
    def triggers(self) -> tuple[Trigger, ...]:
        """The triggers in the order of the hypotheses."""
        return tuple(one.trigger for one in self.recoveries)


def joined(parts: Sequence[Inversion], hypotheses: Sequence[Hypothesis]) -> Inversion:
    """The results of the kinds of triggers as one, in the order of the hypotheses.

    Raises:
        DataError: nothing was searched.
    """
    recoveries = {one.hypothesis: one for part in parts for one in part.recoveries}
    if not recoveries:
        raise DataError(
            "Trigger inversion has no image to search with.",
            "Give clean images of at least two labels that the model labels correctly, at least two of each.",
        )
    return Inversion(
        recoveries=tuple(recoveries[one] for one in hypotheses if one in recoveries),
        skipped=tuple(one for one in hypotheses if one not in recoveries),
        image_steps=sum(part.image_steps for part in parts),
        seconds=sum(part.seconds for part in parts),
        complete=all(part.complete for part in parts),
    )
