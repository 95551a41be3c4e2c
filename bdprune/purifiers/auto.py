"""Tries methods, the cheapest first, until clean images show no sign of the backdoor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import msgspec

from bdprune.analysis import Case, CheckLimits, SearchFor, Signs, check_repair, signs_of
from bdprune.errors import BdpruneError, OptionError, TrainingError
from bdprune.loops import ImplicitSettings
from bdprune.methods import Phases, Purifier, Repair, accuracy_on, hold_out, mixed_views, sure_drop
from bdprune.model import PruneMode
from bdprune.purifiers.ibau import IBAU
from bdprune.purifiers.rnp import RNP
from bdprune.purifiers.trigger_pruning import TriggerPruning
from bdprune.purifiers.trigger_unlearning import TriggerUnlearning, unlearn_after
from bdprune.record import Attempt, Needs, RepairCheck, check_settings
from bdprune.runtime import DEFAULT, Precision, within

Candidate = tuple[str, Callable[[Case], Repair]]

_FEW, _ENOUGH = 50, 150  # below the first, views are too much alike; from the second on there are none
_VIEWS = 500
_MOST_LOST = 0.2  # of the accuracy on few images, whatever their views show
_CAREFUL = (  # I-BAU where no sign of a backdoor is found: its settings, and the parts of the way
    (ImplicitSettings(), (0.2, 0.1)),
    (ImplicitSettings(lr=1e-4), (1.0, 0.8, 0.6, 0.4, 0.2)),
)
_BEFORE_UNLEARNING = 0.05  # fall of accuracy by the pruning before a fine-tuning, which regains a part


@dataclass
class _Remembered:
    """A method and its last repair; None before, and if it failed."""

    method: RNP
    repair: Repair | None = None

    def __call__(self, case: Case) -> Repair:
        self.repair = self.method(case)
        return self.repair


@dataclass(frozen=True)
class _Tried:
    """A repair that was tried, and its check."""

    name: str
    repair: Repair
    check: RepairCheck
    seconds: float

    @property
    def rank(self) -> tuple[int, float, float]:
        """Smaller is better: signs that are left, then flips, then lost accuracy."""
        return *self.check.severity, -self.repair.accuracy_after

    @property
    def attempt(self) -> Attempt:
        """The record of it."""
        return Attempt(
            method=self.name, accuracy_after=self.repair.accuracy_after, left=self.check.left, seconds=self.seconds
        )


@dataclass(frozen=True)
class Auto(Purifier):
    """Chooses among the methods by what clean images show, and says what is left.

    The signs of the backdoor are the recovered triggers that stand out, a label that leads while the network unlearns,
    and filters that unlearning moves most and the clean task does not need. The methods are tried one after another,
    the cheapest first: pruning of the filters that the triggers raise; RNP; the pruning with a fine-tuning; the
    unlearning of the triggers; RNP and then the unlearning; without a trigger, RNP and I-BAU. After each, the known
    triggers are measured on held-out images as they are and grown (:func:`bdprune.loops.grow`), searched again, and
    tried under small random changes of the batch norms; the network is unlearned again if the unlearning showed a sign
    before. The first result without a sign that costs at most ``max_drop`` is
    taken. If the triggers were not unlearned for it, that is done then, and kept if it leaves no sign either. If there
    is no result without a sign, the one with the fewest is taken, and the outcome is ``unrepaired``.

    Without any sign, nothing can be checked, and the outcome is ``unverified``. Then the weights move a part of the
    way to those of I-BAU, as far as ``safe_drop`` allows: at most a fifth, or all of it with a tenth of the learning
    rate. This changes a clean network little, and weakens a backdoor without a sign, such as feature collision.

    Fewer than 150 images are too few to hold some out. Then 500 views of them take their place
    (:func:`bdprune.methods.mixed_views`), and their labels are those that the network before the repair gives
    them. Such a view changes its label more easily than an image, so all limits are larger. A result that loses more
    than 20 % of the images themselves is not used.

    Args:
        search: which triggers are searched; by default those of a scan.
        criteria: what counts as a sign of a backdoor.
        max_drop: largest fall of clean accuracy on the held-out images, less its standard error
            (:func:`bdprune.methods.sure_drop`), in [0, 1].
        safe_drop: the same on views of the held-out images (:func:`bdprune.methods.views_drop`) if there is no sign.
        tolerance: factor of all limits on clean accuracy, above 0.
        views_tolerance: factors of ``tolerance`` for views of fewer than 50 images and of more, above 0.
        held_out: share of the clean images held out for the accuracy and the check.
        mode: how a filter is pruned.
        precision: precision of training (:func:`bdprune.runtime.plan_for`).
        seed: seed of everything random.
    """

    search: SearchFor = field(default_factory=SearchFor)
    criteria: CheckLimits = field(default_factory=CheckLimits)
    max_drop: float = 0.03
    safe_drop: float = 0.0
    tolerance: float = 1.0
    views_tolerance: tuple[float, float] = (5.0, 3.0)
    held_out: float = 0.3
    mode: PruneMode = "zero_gamma"
    precision: Precision = DEFAULT
    seed: int = 0

    id = "bdprune.auto"
    title = "tries methods, the cheapest first, until clean images show no sign of the backdoor"
    needs = Needs(images="labelled", minimum=10)
    cost = "training"
    gives = ("removal", "trigger recovery")
    label = True
    checks_itself = True
    presets: ClassVar[dict[str, dict[str, object]]] = {}

    def __post_init__(self) -> None:
        """Checks the factors."""
        super().__post_init__()
        check_settings(self, above={"tolerance": 0})
        if len(self.views_tolerance) != 2 or not min(self.views_tolerance) > 0:
            raise OptionError(
                f"The setting views_tolerance of Auto is {self.views_tolerance}.", "Give two numbers above 0."
            )

    def __call__(self, case: Case) -> Repair:
        """Repairs a copy of the model.

        Raises:
            DataError: there are too few clean images.
        """
        self.check(case)
        return self._by_views(case) if len(case.images) < _ENOUGH else self._by_images(case)

    def _by_views(self, case: Case) -> Repair:
        """The repair with views of few images; its accuracies are those on the images."""
        views = mixed_views(case.model, case.images, _VIEWS, self.seed)
        tolerant = replace(self, tolerance=self.tolerance * self.views_tolerance[len(case.images) >= _FEW])
        repair = tolerant._by_images(case.with_data(views))
        before, after = (accuracy_on(model, case.images) for model in (case.model, repair.model))
        if not within(before - after, _MOST_LOST):
            return self._too_costly(case, repair, before - after)
        _, held = hold_out(views, self.held_out, self.seed)
        agree = 100 * accuracy_on(repair.model, held)
        return replace(
            repair,
            accuracy_before=before,
            accuracy_after=after,
            selection=f"{repair.selection}; the held-out images are {len(held)} views of the {len(case.images)} images "
            f"that it learns from, and both networks label {agree:.1f} % of them alike",
            params=self.params,
        )

    def _too_costly(self, case: Case, repair: Repair, lost: float) -> Repair:
        """The network as it was: views did not show what the repair costs."""
        why = f"the best result costs {100 * lost:.1f} points of clean accuracy on the {len(case.images)} images"
        verified = repair.check is not None and repair.check.outcome != "unverified"
        return self.repair(
            case,
            case.model,
            case.images,
            selection=f"nothing is changed: {why}",
            seconds=repair.seconds,
            target_label=repair.target_label,
            check=RepairCheck(left=(why,) if verified else ()),
            attempts=tuple(msgspec.structs.replace(one, chosen=False) for one in repair.attempts),
        )

    def _by_images(self, case: Case) -> Repair:
        phase = Phases()
        _, held = hold_out(case.images, self.held_out, self.seed)
        with phase("signs"):
            signs = signs_of(case, held, self.criteria, self.search, self.seed, self.precision)
        if not signs:
            return self._unverified(case, phase)
        tried, attempts = self._try_all(case, signs, phase)
        if not tried:
            return self._unchanged(case, signs, attempts, phase)
        best = self._further(case, min(tried, key=lambda one: one.rank), signs, attempts, phase)
        return self._chosen(best, attempts, signs, phase)

    def _candidates(self, signs: Signs) -> Iterator[Candidate]:
        """The methods in the order of their cost."""
        first_drop = self._limit(min(self.max_drop, TriggerPruning.max_drop))
        tuned = TriggerPruning(
            search=self.search,
            max_drop=first_drop,
            tuned_drop=self._limit(TriggerPruning.tuned_drop),
            regained_drop=self._limit(TriggerPruning.regained_drop),
            held_out=self.held_out,
            mode=self.mode,
            precision=self.precision,
            seed=self.seed,
        )
        pruning = replace(tuned, fine_tuning=None)
        unlearning = self._unlearning()
        rnp = _Remembered(
            RNP.preset(
                "scan",
                mode=self.mode,
                held_out=self.held_out,
                max_drop=first_drop,
                tuned_drop=self._limit(RNP.tuned_drop),
                regained_drop=self._limit(RNP.regained_drop),
                seed=self.seed,
                precision=self.precision,
            )
        )
        known = signs.triggers
        if known:
            yield "trigger_pruning", lambda case: pruning.repaired(case, known, Phases())
        yield "rnp", rnp
        if known:
            yield "trigger_pruning+fine_tuning", lambda case: tuned.repaired(case, known, Phases())
            yield "trigger_unlearning", lambda case: unlearning.repaired(case, known, Phases())
        if known and (first := rnp.repair) is not None and first.change != "nothing":
            yield "rnp+trigger_unlearning", lambda case: unlearn_after(case, first, unlearning, signs.triggers)
        if not known:  # it is trained against what gradients find, and the check relies on that
            ibau_drop = self._limit(min(self.max_drop, IBAU.max_drop))
            yield "ibau", IBAU(held_out=self.held_out, max_drop=ibau_drop, seed=self.seed)

    def _limit(self, drop: float) -> float:
        return min(drop * self.tolerance, 1.0)

    def _unlearning(self) -> TriggerUnlearning:
        return TriggerUnlearning(
            pruning=TriggerPruning(
                search=self.search,
                max_drop=self._limit(_BEFORE_UNLEARNING),
                held_out=self.held_out,
                fine_tuning=None,
                mode=self.mode,
                seed=self.seed,
            ),
            search=self.search,
            max_drop=self._limit(self.max_drop),
            held_out=self.held_out,
            mode=self.mode,
            precision=self.precision,
            seed=self.seed,
        )

    def _try_all(self, case: Case, signs: Signs, phase: Phases) -> tuple[list[_Tried], list[Attempt]]:
        """The results within the limit, and a record of each attempt."""
        tried: list[_Tried] = []
        attempts: list[Attempt] = []
        for name, method in self._candidates(signs):
            with phase(name):
                one = self._try(case, name, method, signs, tried)
            attempts.append(one if isinstance(one, Attempt) else one.attempt)
            if isinstance(one, _Tried):
                tried.append(one)
                if not one.check.left:
                    break
        return tried, attempts

    def _further(self, case: Case, best: _Tried, signs: Signs, attempts: list[Attempt], phase: Phases) -> _Tried:
        """The result of the unlearning of the triggers after a repair without it, if that leaves no sign either.

        A recovered trigger is weaker than the true one: what is no sign any more may still be a part of the backdoor.
        """
        if best.check.left or not signs.triggers or best.name.endswith("trigger_unlearning"):
            return best
        name = f"{best.name}+trigger_unlearning"
        with phase(name):
            one = self._try(
                case, name, lambda case: unlearn_after(case, best.repair, self._unlearning(), signs.triggers), signs, ()
            )
        attempts.append(one if isinstance(one, Attempt) else one.attempt)
        return best if isinstance(one, Attempt) or one.check.left else one

    def _try(
        self, case: Case, name: str, method: Callable[[Case], Repair], signs: Signs, tried: Sequence[_Tried]
    ) -> _Tried | Attempt:
        start = time.perf_counter()
        try:
            repair = method(case)
        except BdpruneError as error:
            return Attempt(method=name, accuracy_after=None, rejected=str(error), seconds=time.perf_counter() - start)
        if rejected := self._why_rejected(case, repair, signs, tried):
            spent = time.perf_counter() - start
            return Attempt(method=name, accuracy_after=repair.accuracy_after, rejected=rejected, seconds=spent)
        try:
            check = check_repair(case, repair.model, signs, self.criteria, self.search, self.seed, self.precision)
        except BdpruneError as error:
            spent, why = time.perf_counter() - start, f"its result cannot be checked: {error}"
            return Attempt(method=name, accuracy_after=repair.accuracy_after, rejected=why, seconds=spent)
        return _Tried(name, repair, check, time.perf_counter() - start)

    def _why_rejected(self, case: Case, repair: Repair, signs: Signs, tried: Sequence[_Tried]) -> str:
        """Why a result is not considered, in a phrase; empty if it is."""
        if repair.change == "nothing":
            return repair.selection
        if sure_drop(case.model, repair.model, signs.held) > self._limit(self.max_drop):
            drop = repair.accuracy_before - repair.accuracy_after
            return f"it costs {100 * drop:.1f} points of clean accuracy"
        same = [
            one.name
            for one in tried
            if repair.change == one.repair.change == "pruned" and repair.pruned == one.repair.pruned
        ]
        return f"it prunes the same filters as {same[0]}" if same else ""

    def _chosen(self, best: _Tried, attempts: list[Attempt], signs: Signs, phase: Phases) -> Repair:
        marked = [msgspec.structs.replace(one, chosen=one.method == best.name) for one in attempts]
        others = f"of {len(attempts)} tried" if len(attempts) > 1 else "the first tried"
        reason = "no sign of the backdoor is left" if not best.check.left else "it leaves the fewest signs"
        return replace(
            best.repair,
            method=self.id,
            selection=f"{best.name}, {others}: {reason}; {best.repair.selection}",
            target_label=signs.label,
            seconds=phase.seconds,
            params=self.params,
            check=best.check,
            attempts=tuple(marked),
        )

    def _unchanged(self, case: Case, signs: Signs, attempts: list[Attempt], phase: Phases) -> Repair:
        check = check_repair(case, case.model, signs, self.criteria, self.search, self.seed, self.precision)
        last = attempts[-1]
        return self.repair(
            case,
            case.model,
            signs.held,
            selection=f"nothing is changed: {last.method}, the last of {len(attempts)} tried: {last.rejected}",
            target_label=signs.label,
            seconds=phase.seconds,
            check=check,
            attempts=tuple(attempts),
        )

    def _unverified(self, case: Case, phase: Phases) -> Repair:
        """I-BAU within a small limit, because nothing shows whether a repair works."""
        drop = min(self.safe_drop, self.max_drop)
        try:
            with phase("ibau"):
                for settings, ways in _CAREFUL:
                    careful = IBAU(
                        settings, retries=0, max_drop=drop, held_out=self.held_out, ways=ways, seed=self.seed
                    )
                    if (repair := careful(case)).change != "nothing":
                        break
        except TrainingError as error:
            return self._untouched(case, phase, f"I-BAU cannot run: {error}")
        return replace(
            repair,
            method=self.id,
            selection=f"no sign of a backdoor was found, so I-BAU is used with care: {repair.selection}",
            seconds=phase.seconds,
            params=self.params,
            check=RepairCheck(),
            attempts=(_careful_attempt(repair, phase),),
        )

    def _untouched(self, case: Case, phase: Phases, why: str) -> Repair:
        """The network as it is, because I-BAU cannot train it."""
        _, held = hold_out(case.images, self.held_out, self.seed)
        selection = f"nothing is changed: no sign of a backdoor was found, and {why}"
        return self.repair(
            case, case.model, held, selection=selection, seconds=phase.seconds, check=RepairCheck(), attempts=()
        )


def _careful_attempt(repair: Repair, phase: Phases) -> Attempt:
    changed = repair.change != "nothing"
    return Attempt(
        method="ibau",
        accuracy_after=repair.accuracy_after,
        rejected="" if changed else repair.selection,
        chosen=changed,
        seconds=phase.seconds["ibau"],
    )
