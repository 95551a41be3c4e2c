"""The triggers of a case: which labels are searched if there are many, and in which order if time is short."""

from __future__ import annotations

import pytest
import torch

from bdprune.analysis import Case, LabelOrder, Triggers, promising_labels
from bdprune.analysis import triggers as module
from bdprune.errors import BdpruneError
from bdprune.loops import Hypothesis, InvertSettings, Stage
from bdprune.runtime import Budget

from ..written import Known, known_networks

SHORT = InvertSettings(stages=(Stage(2, 4),), final=Stage(1, 4, keep=1), rounds=0)


@pytest.fixture(scope="module")
def known() -> Known:
    return known_networks()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_LABELS", {"fast": 2, "default": 3, "full": None})


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("level", "count"), [("fast", 2), ("default", 3), ("full", 10)])
def test_the_budget_limits_the_labels_and_the_result_names_the_others(known: Known, level: str, count: int) -> None:
    case = Case(known.backdoored, known.data, budget=Budget(level))  # type: ignore[arg-type]
    found = case.get(Triggers(SHORT))
    searched = {one.hypothesis.target for one in found.recoveries}
    assert len(searched - {None}) == count and None in searched
    assert searched | {one.target for one in found.skipped} == {*range(10), None}
    if count < 10:
        assert searched - {None} == set(promising_labels(case, count).tolist())
        assert found.recoveries[0].hypothesis.target is None


@pytest.mark.usefixtures("few")
def test_given_hypotheses_are_all_searched(known: Known) -> None:
    wanted = tuple(Hypothesis(label) for label in range(5))
    found = Case(known.clean, known.data).get(Triggers(SHORT, hypotheses=wanted))
    assert [one.hypothesis for one in found.recoveries] == list(wanted) and not found.skipped


def test_the_untargeted_trigger_is_kept_when_time_is_short(known: Known) -> None:
    long = InvertSettings(stages=(Stage(3000, 32),), final=Stage(1, 4, keep=1), rounds=0)
    found = Case(known.clean, known.data).get(Triggers(long, seconds=0.5))
    assert found.recoveries[0].hypothesis.target is None and found.skipped
    easiest = Case(known.clean, known.data).get(LabelOrder()).tolist()
    searched = [one.hypothesis.target for one in found.recoveries]
    assert searched == [None, *easiest][: len(searched)]


@pytest.mark.usefixtures("few")
def test_a_stack_searches_the_labels_of_each_model(known: Known) -> None:
    turned = known.clean.clone().network
    head = [module for module in turned.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        head.bias += torch.linspace(0, 5, 10)  # other labels are easy to reach
    models = [known.clean, known.clean.with_network(turned)]
    cases = [Case(model, known.data) for model in models]
    alone = [Triggers(SHORT).compute(case) for case in cases]
    assert alone[0].skipped != alone[1].skipped
    together = Triggers(SHORT).compute_stack(cases)
    for found, single in zip(together, alone, strict=True):
        assert not isinstance(found, BdpruneError)
        assert [one.hypothesis for one in found.recoveries] == [one.hypothesis for one in single.recoveries]
        assert found.skipped == single.skipped
    same = Triggers(SHORT).compute_stack([cases[0], cases[0]])
    assert all(not isinstance(one, BdpruneError) and one.skipped == alone[0].skipped for one in same)


@pytest.mark.usefixtures("few")
def test_models_of_a_stack_with_other_labels_share_the_time(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float | None] = []
    monkeypatch.setattr(Triggers, "compute", lambda self, case: limits.append(self.seconds))
    cases = [Case(known.clean, known.data) for _ in range(4)]
    monkeypatch.setattr(Triggers, "_wanted", lambda self, case: (Hypothesis(cases.index(case)),))
    Triggers(SHORT, seconds=8.0).compute_stack(cases)
    assert limits == [2.0] * 4
