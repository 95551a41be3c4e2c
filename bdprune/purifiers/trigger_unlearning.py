"""Fine-tunes on images with the recovered triggers and their true labels, then searches again, for some rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bdprune.analysis import Case, Outstanding, flips_of, search_again, with_grown
from bdprune.data import CleanData
from bdprune.errors import TrainingError
from bdprune.loops import (
    FineTuneSettings,
    GrowthSettings,
    KeptPruned,
    StampedAndTaught,
    StampedLabels,
    Stamping,
    Trigger,
    fine_tune,
)
from bdprune.methods import Phases, Repair, TriggerPurifier, hold_out, sure_drop, what_changed
from bdprune.model import Model, PruneMode
from bdprune.purifiers.trigger_pruning import TriggerPruning
from bdprune.record import Needs
from bdprune.runtime import DEFAULT, Precision

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "pruning": None,
        "rounds": 1,
        "halvings": 0,
        "taught": 0.0,
        "growth": None,
        "stamping": Stamping(share=0.2, jitter=0.0, shift=0),
        "tuning": FineTuneSettings(lr=0.01, epochs=1),
        "max_drop": 1.0,
    },
    "robust": {},
}


@dataclass(frozen=True)
class TriggerUnlearning(TriggerPurifier):
    """Teaches the network the true labels of images that carry the recovered triggers.

    The triggers are stamped on a share of each step, with varied strength and place, because a recovered trigger
    differs from the true one. A small patch is also stamped as it has grown (:func:`bdprune.loops.grow`), because the
    search finds only a part of the true one. After each round the search is repeated for the same labels. The triggers
    that it finds join the next round, until they are about as large as those that lead to other labels. By default the
    filters that the triggers raise are pruned first (:class:`bdprune.purifiers.trigger_pruning.TriggerPruning`) and
    stay pruned: alone, the fine-tuning is weak, because it hides the recovered trigger rather than the backdoor. A
    network without convolutions is not pruned.

    The preset ``paper`` is the unlearning of Neural Cleanse: one pass over the images, 20 % of which carry the trigger,
    without a limit of the accuracy. The search is that of a scan.

    Args:
        pruning: settings of the pruning before; None for none. Its ``seed``, ``mode``, ``precision`` and
            ``held_out`` are those of this method.
        tuning: settings of the fine-tuning of one round.
        growth: how patches grow; None for not.
        stamping: how the triggers are stamped.
        rounds: maximum number of rounds.
        halvings: a round that costs too much accuracy is repeated with half the learning rate, so many times in all.
        taught: weight of a second loss in the fine-tuning, which keeps the predictions of the network before the
            repair on images without a trigger (:class:`bdprune.loops.StampedAndTaught`); 0 for none.
        search: which triggers are searched; by default those of a scan.
        least: smallest score of a trigger that counts (:class:`bdprune.detectors.inversion.InversionDetector`).
        enough: a trigger that is searched again ends the rounds with a smaller score. It is less than ``least``,
            because its label is known by then: the next smallest trigger of a backdoor often does not stand out.
        gone: largest share of the images that a grown patch may flip at the end of the rounds.
        max_drop: largest fall of clean accuracy on the held-out images, less its standard error
            (:func:`bdprune.methods.sure_drop`), in [0, 1]; a round beyond it is not taken.
        held_out: share of the clean images held out for the accuracy.
        mode: how a filter is pruned.
        precision: precision of the fine-tuning (:func:`bdprune.runtime.plan_for`).
        seed: seed of the search, of the split and of the fine-tuning.
    """

    pruning: TriggerPruning | None = field(default_factory=lambda: TriggerPruning(max_drop=0.05, fine_tuning=None))
    tuning: FineTuneSettings = field(default_factory=lambda: FineTuneSettings(lr=0.005, epochs=10, schedule="cosine"))
    growth: GrowthSettings | None = field(default_factory=GrowthSettings)
    stamping: Stamping = field(default_factory=lambda: Stamping(share=0.3))
    rounds: int = 5
    halvings: int = 2
    taught: float = 1.0
    enough: float = 0.4
    gone: float = 0.1
    max_drop: float = 0.03
    held_out: float = 0.3
    mode: PruneMode = "zero_gamma"
    precision: Precision = DEFAULT

    id = "bdprune.trigger_unlearning"
    title = "prunes, then learns the true labels of images with the recovered triggers"
    paper = "after Wang et al., Neural Cleanse, S&P 2019, Section VI.C (patching by unlearning)"
    needs = Needs(images="labelled", minimum=20)
    cost = "training"
    gives = ("removal", "trigger recovery")
    label = True
    limits = "It removes backdoors whose trigger the search recovers. Without such a trigger it changes nothing."
    presets = PRESETS

    def repaired(
        self, case: Case, known: Sequence[Outstanding], phase: Phases, kept: Mapping[str, list[int]] | None = None
    ) -> Repair:
        """The repair by known triggers.

        Args:
            case: the case; its model may be another form of the network that the triggers come from.
            known: the triggers; without any, nothing changes.
            phase: takes the times.
            kept: filters that are pruned already and stay so, group name -> indices.
        """
        rest, held = hold_out(case.images, self.held_out, self.seed)
        if not known:
            nothing = "nothing is changed: no recovered trigger stands out"
            return self.repair(case, case.model, held, selection=nothing, seconds=phase.seconds)
        if self.growth:
            with phase("grow"):
                known = [with_grown(case, one, self.growth, self.seed) for one in known]
        model, pruned = self._pruned(case, known, phase, kept or {})
        best, rounds = self._rounds(case, model, pruned, (rest, held), known, phase)
        if not rounds and sure_drop(case.model, best, held) > self.max_drop:
            best, pruned = case.model, KeptPruned(kept or {}, self.mode)
        return self.repair(
            case,
            best,
            held,
            pruned={name: list(index) for name, index in pruned.filters.items()},
            retrained=rounds > 0,
            selection=self._selection(known, rounds, bool(pruned.filters), len(held)),
            target_label=known[0].trigger.target,
            seconds=phase.seconds,
        )

    def _pruned(
        self, case: Case, known: Sequence[Outstanding], phase: Phases, kept: Mapping[str, list[int]]
    ) -> tuple[Model, KeptPruned]:
        if self.pruning is None or not case.model.groups:
            return case.model, KeptPruned(kept, self.mode)
        pruning = replace(
            self.pruning, seed=self.seed, mode=self.mode, precision=self.precision, held_out=self.held_out
        )
        repair = pruning.repaired(case, known, phase)
        all_pruned = {name: [*kept.get(name, ()), *repair.pruned.get(name, ())] for name in {**kept, **repair.pruned}}
        return repair.model, KeptPruned(all_pruned, self.mode)

    def _rounds(
        self,
        case: Case,
        model: Model,
        pruned: KeptPruned,
        split: tuple[CleanData, CleanData],
        known: Sequence[Outstanding],
        phase: Phases,
    ) -> tuple[Model, int]:
        """The last model within the limit, and the number of its rounds."""
        rest, held = split
        grown = [one.grown for one in known if one.grown is not None]
        triggers, tuning, slower = [*(one.trigger for one in known), *grown], self.tuning, 0

        def tuned(number: int) -> Model:
            seed = self.seed + number
            objective = self._objective(case.model, triggers, seed)
            return fine_tune(model, rest, tuning, pruned, seed, self.precision, objective)

        for number in range(self.rounds):
            with phase(f"round_{number + 1}"):
                after = tuned(number)
                while sure_drop(case.model, after, held) > self.max_drop:
                    if slower == self.halvings:
                        return model, number
                    tuning, slower = replace(tuning, lr=tuning.lr / 2), slower + 1
                    after = tuned(number)
                model = after
            if number + 1 < self.rounds:
                again = self._again(case.with_model(model), known, number, phase)
                if not again and all(flips_of(model, one, rest) <= self.gone for one in grown):
                    return model, number + 1
                triggers += again
        return model, self.rounds

    def _objective(self, before: Model, triggers: Sequence[Trigger], seed: int) -> StampedLabels:
        if not self.taught:
            return StampedLabels(triggers, self.stamping, seed)
        teacher = before.clone().module.eval()
        return StampedAndTaught(triggers, self.stamping, seed, teacher, self.taught)

    def _again(self, case: Case, known: Sequence[Outstanding], number: int, phase: Phases) -> list[Trigger]:
        """The triggers that the network of ``case`` still has after a round."""
        with phase(f"search_{number + 1}"):
            found = [search_again(case, one, self.search, self.seed + number) for one in known]
        return [one.trigger for one in found if one.score >= self.enough]

    def _selection(self, known: Sequence[Outstanding], rounds: int, pruned: bool, held: int) -> str:
        names = ", ".join(one.name for one in known)
        first = f"filters raised by the triggers ({names}) are pruned" if pruned else ""
        if not rounds:
            nothing = first or "nothing is changed"
            return f"{nothing}: a round of unlearning costs more than {100 * self.max_drop:g} points on {held} images"
        then = f"{rounds} round{'s' if rounds > 1 else ''} of unlearning of the triggers ({names})"
        return f"{first}, then {then}" if first else then


def unlearn_after(case: Case, before: Repair, second: TriggerUnlearning, known: Sequence[Outstanding]) -> Repair:
    """The unlearning of the triggers on the result of another method; the filters pruned by both stay pruned.

    Raises:
        TrainingError: no round of the unlearning was taken.
    """
    after = second.repaired(case.with_model(before.model), known, Phases(), before.pruned)
    if "retrained" not in after.change:
        raise TrainingError(f"It is the same as the result before it: {after.selection}.", "")
    groups = [group.name for group in case.model.groups]
    both = {name: sorted({*before.pruned.get(name, ()), *after.pruned.get(name, ())}) for name in groups}
    pruned = {name: index for name, index in both.items() if index}
    return replace(
        after,
        accuracy_before=before.accuracy_before,
        pruned=pruned,
        change=what_changed(pruned=bool(pruned), retrained=True),
        selection=f"{before.selection}; then {after.selection}",
        threshold=before.threshold,
        curve=before.curve,
        masks=before.masks,
        attachments=(*before.attachments, *after.attachments),
    )
