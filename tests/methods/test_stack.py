"""A detector on a stack of models gives the same evidence as on each model, and computes nothing twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from bdprune.analysis import Analysis, Case, Lipschitz, Memo, Unlearning
from bdprune.detectors.lipschitz import LipschitzDetector
from bdprune.detectors.suspiciousness import SuspiciousnessDetector
from bdprune.detectors.unlearning import UnlearningDetector
from bdprune.errors import BdpruneError, DataError, TrainingError
from bdprune.loops import UnlearnSettings
from bdprune.methods import Detector, Steps, examine_stack
from bdprune.model import Model
from bdprune.record import Evidence

from ..helpers import siblings

QUICK = UnlearnSettings(lr=0.02, batch_size=60, max_epochs=3, padding=1)


@dataclass(eq=False)
class Log:
    """Names of models, in the groups in which they were computed."""

    computed: list[tuple[str, list[str]]] = field(default_factory=list)

    def of(self, name: str) -> list[list[str]]:
        return [models for one, models in self.computed if one == name]


@dataclass(frozen=True)
class Part(Analysis[str]):
    """Returns its name and the model's; fails on the given models."""

    name: str
    log: Log
    breaks: tuple[str, ...] = ()

    def compute(self, case: Case) -> str:
        self.log.computed.append((self.name, [case.model.arch]))
        if case.model.arch in self.breaks:
            raise TrainingError(f"{case.model.arch} blew up.", "Do not.")
        return f"{self.name} of {case.model.arch}"

    def compute_stack(self, cases: Sequence[Case]) -> list[str | BdpruneError]:
        self.log.computed.append((self.name, [case.model.arch for case in cases]))
        return [
            TrainingError(f"{case.model.arch} blew up.", "Do not.")
            if case.model.arch in self.breaks
            else f"{self.name} of {case.model.arch}"
            for case in cases
        ]


@dataclass(frozen=True)
class Asker(Detector):
    """Requests ``first``, then the scripted analyses of each model; may continue after an error."""

    log: Log
    script: dict[str, list[str]]
    breaks: tuple[str, ...] = ()
    forgives: bool = False
    refuses: str = ""

    id = "x.asker"
    title = "asks"

    def steps(self, case: Case) -> Steps:
        if case.model.arch == self.refuses:
            raise DataError("Not this one.", "")
        received: list[str] = []
        for name in ["first", *self.script.get(case.model.arch, [])]:
            try:
                received.append((yield Part(name, self.log, self.breaks)))
            except TrainingError as error:
                if not self.forgives:
                    raise
                received.append(error.message)
        return self.evidence(len(received), 0, details={"received": received}, params={})


def cases(bright: Any, *names: str) -> list[Case]:
    return [Case(Model(bright.model.network, name, 3, (3, 8, 8)), bright.data) for name in names]


def received(found: Sequence[Evidence | BdpruneError]) -> list[Any]:
    return [one.details["received"] if isinstance(one, Evidence) else one.message for one in found]


def test_equal_requests_are_computed_in_one_stack(bright: Any) -> None:
    log = Log()
    detector = Asker(log, {"a": ["second", "third"], "b": ["other"], "c": ["second"]})
    found = examine_stack(detector, cases(bright, "a", "b", "c", "d"))
    assert received(found) == [
        ["first of a", "second of a", "third of a"],
        ["first of b", "other of b"],
        ["first of c", "second of c"],
        ["first of d"],
    ]
    assert log.computed == [
        ("first", ["a", "b", "c", "d"]),
        ("second", ["a", "c"]),
        ("other", ["b"]),
        ("third", ["a"]),
    ]


def test_an_error_affects_only_its_model(bright: Any) -> None:
    log = Log()
    detector = Asker(log, {"a": ["second"], "c": ["second"]}, breaks=("b",), refuses="d")
    found = examine_stack(detector, cases(bright, "a", "b", "c", "d"))
    assert received(found) == [
        ["first of a", "second of a"],
        "b blew up.",
        ["first of c", "second of c"],
        "Not this one.",
    ]
    assert isinstance(found[1], TrainingError) and isinstance(found[3], DataError)
    assert log.computed == [("first", ["a", "b", "c"]), ("second", ["a", "c"])]


@pytest.mark.parametrize("names", [("a", "b"), ("b",)], ids=["in a stack", "alone"])
def test_a_detector_may_continue_after_an_error(bright: Any, names: tuple[str, ...]) -> None:
    detector = Asker(Log(), {"b": ["second"]}, breaks=("b",), forgives=True)
    assert received(examine_stack(detector, cases(bright, *names)))[-1] == ["b blew up."] * 2


def test_known_outcomes_are_not_computed_again(bright: Any) -> None:
    log = Log()
    detector = Asker(log, {"a": ["second"], "b": ["second"], "c": ["second"]})
    stack = cases(bright, "a", "b", "c")
    stack[1].in_order().get(Part("first", log))
    log.computed.clear()
    expected = received(examine_stack(detector, stack))
    assert log.computed == [("first", ["a", "c"]), ("second", ["a", "b", "c"])]
    log.computed.clear()
    assert received(examine_stack(detector, stack)) == expected == received([detector(case) for case in stack])
    assert log.computed == []


def test_an_error_is_computed_again_and_stored_results_stay(bright: Any) -> None:
    log = Log()
    stack = cases(bright, "a", "b")
    examine_stack(Asker(log, {}, breaks=("b",)), stack)
    log.computed.clear()
    examine_stack(Asker(log, {}, breaks=("b",)), stack)
    assert log.computed == [("first", ["b"])]


def test_stacks_of_one_and_of_no_model(bright: Any) -> None:
    log = Log()
    assert received(examine_stack(Asker(log, {}), cases(bright, "a"))) == [["first of a"]]
    assert examine_stack(Asker(log, {}), []) == []


@dataclass(frozen=True)
class Short(Analysis[int]):
    """Returns no outcome for the first model."""

    def compute(self, case: Case) -> int:
        return len(case.model.arch)

    def compute_stack(self, cases: Sequence[Case]) -> list[int]:
        return [self.compute(case) for case in cases[1:]]


@dataclass(frozen=True)
class ShortDetector(Detector):
    id = "x.short"
    title = "forgets one"

    def steps(self, case: Case) -> Steps:
        return self.evidence((yield Short()), 0)


def test_too_few_outcomes_are_a_bug_and_none_is_kept(bright: Any) -> None:
    stack = cases(bright, "a", "bb", "ccc")
    with pytest.raises(ValueError, match="zip"):
        examine_stack(ShortDetector(), stack)
    assert [ShortDetector()(case).score for case in stack] == [1, 2, 3]


def test_the_models_of_a_stack_may_share_a_memo(bright: Any) -> None:
    """A case with the memo of the process, like those of models from files."""
    memo = Memo()
    models = siblings(bright.model, 3)
    stack = [Case(model, bright.data, memo) for model in models]
    found = examine_stack(LipschitzDetector(), stack)
    alone = [LipschitzDetector()(Case(model)) for model in models]
    assert [one.score for one in found if isinstance(one, Evidence)] == [one.score for one in alone]
    assert all(case.key(Lipschitz()) in memo for case in stack)


@pytest.mark.parametrize(
    "detector",
    [LipschitzDetector(), UnlearningDetector(QUICK, max_runs=2, margin=1)],
    ids=["lipschitz", "unlearning"],
)
def test_built_in_detectors_give_a_stack_the_evidence_of_each_model(bright: Any, detector: Detector) -> None:
    models = siblings(bright.model, 3, scale=0.02)
    mixed = bright.data.subset(torch.randperm(len(bright.data), generator=torch.Generator().manual_seed(1)))
    found = examine_stack(detector, [Case(model, mixed) for model in models])
    for model, mine in zip(models, found, strict=True):
        its = detector(Case(model, bright.data))
        assert isinstance(mine, Evidence)
        assert mine.score == pytest.approx(its.score, abs=1e-6)
        assert (mine.flagged, mine.target_label, mine.params) == (its.flagged, its.target_label, its.params)


def test_detectors_declare_whether_they_accept_stacks() -> None:
    assert LipschitzDetector.takes_stacks() and UnlearningDetector.takes_stacks()
    assert not SuspiciousnessDetector.takes_stacks()
    assert UnlearningDetector(QUICK).batch_size == 60 and LipschitzDetector().batch_size == 0


@dataclass(frozen=True)
class Nothing(Detector):
    id = "x.nothing"
    title = "nothing"


def test_a_detector_without_methods_is_an_error_that_names_them(bright: Any) -> None:
    with pytest.raises(NotImplementedError, match="Nothing defines neither __call__ nor steps"):
        Nothing()(Case(bright.model))


def test_a_repair_reuses_the_unlearning_of_a_stack(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the plain form of a model is the model itself, its unlearning has both keys."""
    stack = [Case(model, bright.data) for model in siblings(bright.model, 2)]
    examine_stack(UnlearningDetector(QUICK, max_runs=1), stack)
    monkeypatch.setattr("bdprune.analysis.unlearned.unlearn", lambda *args: pytest.fail("unlearned again"))
    for case in stack:
        assert case.in_order().get(Unlearning(QUICK)).trajectory
