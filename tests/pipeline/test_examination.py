"""The detectors of one model: who runs, who waits for time, and what the result says about the others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from bdprune.analysis import Case, Sanity
from bdprune.errors import BudgetError
from bdprune.methods import Detector
from bdprune.pipeline import examination
from bdprune.pipeline.examination import Examination, seconds_per_image
from bdprune.record import Evidence, Sign
from bdprune.runtime import Budget

SANE = Sanity(1.0, True, "Clean accuracy is 100.0 % on 90 images.")


@dataclass
class Fake(Detector):
    """A detector with a fixed score that needs some image passes; it keeps the time that it was given."""

    id: str
    sign: Sign = "other"
    score: float = 0.1
    passes: float = 0.0
    late: bool = False
    given: list[float] = field(default_factory=list)

    title = "a fixed verdict"

    def work(self, case: Case) -> float:
        return self.passes

    def __call__(self, case: Case) -> Evidence:
        self.given.append(case.budget.remaining)
        if self.late:
            raise BudgetError("It needs about 90 s more, and 5 s of the budget are left.", "Allow more.")
        return self.evidence(self.score, 0.5, target_label=1 if self.score > 0.5 else None, params={})


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image takes a second."""
    monkeypatch.setattr(examination, "seconds_per_image", lambda model: 1.0)


def examined(bright: Any, detectors: Sequence[Fake], budget: Budget, **options: Any) -> Examination:
    exam = Examination(Case(bright.model, bright.data), SANE, detectors, budget.started(), **options)
    for place in range(len(detectors)):
        if exam.wants(place):
            exam.run(place)
    return exam


def texts(exam: Examination) -> list[str]:
    return [one.message for one in exam.findings()]


PAIR = (("x.one", "collapse"), ("x.two", "trigger"), ("x.three", "pruning"))


def test_it_stops_once_two_kinds_agree_and_names_the_rest(bright: Any) -> None:
    detectors = [Fake(name, sign, 0.9) for name, sign in PAIR]  # type: ignore[arg-type]
    exam = examined(bright, detectors, Budget(), stops=True)
    assert [one.detector for one in exam.evidence.values()] == ["x.one", "x.two"]
    assert exam.judgement().verdict == "backdoored" and exam.not_run == ("x.three",)
    assert texts(exam) == ["Not run, because two kinds of evidence already agree: x.three."]


def test_it_never_stops_towards_clean_nor_if_all_were_asked_for(bright: Any) -> None:
    quiet = [Fake(name, sign) for name, sign in PAIR]  # type: ignore[arg-type]
    exam = examined(bright, quiet, Budget(), stops=True)
    assert exam.judgement().verdict == "clean" and exam.not_run == () and texts(exam) == []
    loud = [Fake(name, sign, 0.9) for name, sign in PAIR]  # type: ignore[arg-type]
    assert examined(bright, loud, Budget()).not_run == ()


def test_a_detector_that_does_not_fit_is_named_with_what_nobody_looked_at(bright: Any, pace: None) -> None:
    detectors = [Fake("x.one", "collapse", passes=1240), Fake("x.two", "trigger", passes=20)]
    exam = examined(bright, detectors, Budget(seconds=300))
    assert exam.not_run == ("x.one",)
    (message,) = texts(exam)
    assert message.startswith("Not run, because the budget of 300 s does not suffice: x.one (needs about 1,240 s).")
    assert message.endswith(
        "So it was not checked whether there is a collapse of the predictions onto one label under unlearning."
    )
    assert exam.judgement().verdict == "inconclusive"


def test_what_another_detector_looked_at_is_not_missed(bright: Any, pace: None) -> None:
    detectors = [Fake("x.one", "trigger"), Fake("x.two", "trigger", passes=1000)]
    (message,) = texts(examined(bright, detectors, Budget(seconds=300)))
    assert message.endswith("x.two (needs about 1,000 s).")


def test_a_detector_leaves_time_for_later_ones_that_fit(bright: Any, pace: None) -> None:
    greedy = Fake("x.greedy", "trigger", passes=50)
    later = [Fake("x.large", passes=500), Fake("x.small", passes=100), Fake("x.free")]
    exam = examined(bright, [greedy, *later], Budget(seconds=300))
    assert greedy.given[0] == pytest.approx(200, abs=20)
    assert later[1].given[0] == pytest.approx(300, abs=20) and exam.not_run == ("x.large",)


def test_models_of_a_stack_share_their_time(bright: Any, pace: None) -> None:
    detectors = [Fake("x.one", passes=100)]
    assert examined(bright, detectors, Budget(seconds=300), models=4).not_run == ("x.one",)
    assert examined(bright, detectors, Budget(seconds=300), models=2).not_run == ()


def test_a_detector_whose_time_ends_did_not_run(bright: Any) -> None:
    exam = examined(bright, [Fake("x.one", "collapse", late=True), Fake("x.two", "trigger")], Budget(seconds=300))
    assert exam.not_run == ("x.one",) and 0 not in exam.evidence
    assert "x.one (it needs about 90 s more, and 5 s of the budget are left)" in texts(exam)[0]


def test_nothing_runs_after_the_end(bright: Any) -> None:
    budget = Budget(seconds=0.001).started()
    time.sleep(0.01)
    exam = Examination(Case(bright.model, bright.data), SANE, [Fake("x.one"), Fake("x.two")], budget)
    assert [exam.wants(place) for place in range(2)] == [False, False]
    assert "does not suffice: x.one, x.two." in texts(exam)[0]


def test_without_a_time_limit_nothing_is_measured(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: Any) -> float:
        raise AssertionError("a trial")

    monkeypatch.setattr(examination, "seconds_per_image", fail)
    assert examined(bright, [Fake("x.one", passes=1e9)], Budget("full")).not_run == ()


def test_the_trial_takes_a_moment_and_survives_a_model_that_fails(bright: Any) -> None:
    start = time.perf_counter()
    assert 0 < seconds_per_image(bright.model) < 1
    assert time.perf_counter() - start < 10
    from dataclasses import replace

    assert seconds_per_image(replace(bright.model, input_shape=(7, 8, 8))) == 0.0
