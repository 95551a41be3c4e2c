"""The checks of purifiers find errors, and name the failed check."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bdprune.analysis.case import Case
from bdprune.methods.purifier import Purifier, Repair
from bdprune.model.edit.pruning import prune
from bdprune.testing.planted import planted
from bdprune.testing.purifiers import check_purifier, purifier_checks


@dataclass(frozen=True)
class Idle(Purifier):
    """Changes nothing in a copy of the model, except for the fault that ``fault`` names."""

    fault: str = ""

    id = "example.idle"
    title = "nothing"
    limits = "It does nothing."

    def __call__(self, case: Case) -> Repair:
        self.check(case)
        group = case.model.groups[0].name
        said: dict[str, Any] = {"change": "nothing"}
        model = case.model.clone()
        if self.fault == "prunes without a report":
            model = prune(model, {group: [1]})
        if self.fault == "claims a cut":
            said = {"change": "pruned", "pruned": {group: [1]}}
        if self.fault == "cuts another filter":
            model, said = prune(model, {group: [2]}), {"change": "pruned", "pruned": {group: [1]}}
        if self.fault == "cuts one more":
            model, said = prune(model, {group: [1, 2]}), {"change": "pruned", "pruned": {group: [1]}}
        if self.fault == "breaks the network":
            said = {"change": "retrained"}
            with torch.no_grad():
                next(model.network.parameters()).zero_()
        return Repair(
            model=model, method=self.id, selection="none", accuracy_before=1.0, accuracy_after=1.0, params={}, **said
        )


def test_passed_checks_and_reasons_of_skipped_checks_are_reported() -> None:
    report = check_purifier(Idle)
    assert report.pop("removes a planted backdoor") == "skipped: It does nothing."
    assert set(report.values()) == {"passed"}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("prunes without a report", "the change 'nothing', but the weights show another"),
        ("claims a cut", "the change 'pruned', but the weights show another"),
        ("cuts another filter", "is reported as pruned but is not"),
        ("cuts one more", "Other tensors than the pruned filters have changed"),
        ("breaks the network", "Clean accuracy falls"),
    ],
)
def test_the_failed_check_is_named(fault: str, said: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(said)):
        check_purifier(Idle(fault))


class Boastful(Idle):
    """Claims that it removes backdoors."""

    limits = ""


def test_a_purifier_without_limits_must_remove_the_backdoor() -> None:
    with pytest.raises(AssertionError, match=r"Attack success is 1[.]00 after the repair"):
        dict(purifier_checks(Boastful()))["removes a planted backdoor"]()


def test_the_planted_networks_have_the_stated_backdoors() -> None:
    world = planted()
    assert world.attack_success(world.backdoored) > 0.95 and world.attack_success(world.clean) < 0.1
    assert min(map(world.accuracy, (world.backdoored, world.clean))) > 0.95
    assert planted() is world
