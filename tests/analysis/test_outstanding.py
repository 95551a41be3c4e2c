"""The recovered triggers that stand out."""

from __future__ import annotations

import math

import pytest
import torch

from bdprune.analysis import Case, SearchFor, excess_flips, outstanding_triggers, search_again
from bdprune.analysis.outstanding import Outstanding
from bdprune.loops import Trigger

from ..written import known_networks

PATCH = SearchFor(kinds=("patch",))


def test_the_trigger_of_a_backdoor_stands_out_and_is_gone_in_the_clean_twin() -> None:
    known = known_networks()
    case = Case(known.backdoored, known.data)
    found = outstanding_triggers(case, PATCH)
    assert found and found[0].trigger.target == known.target and found[0].score >= 1.5
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert found[0].name == f"patch to label {known.target}"
    assert found[0].score_of(found[0].size) == pytest.approx(found[0].score)
    again, gone = (search_again(case.with_model(one), found[0], PATCH) for one in (known.backdoored, known.clean))
    assert again.score >= 1.5 > gone.score


def test_a_clean_network_has_none() -> None:
    known = known_networks()
    assert outstanding_triggers(Case(known.clean, known.data), PATCH) == []


def test_a_larger_trigger_has_a_smaller_score() -> None:
    trigger = Trigger(torch.zeros(1, 4, 4), torch.zeros(3, 4, 4), target=None)
    one = Outstanding(trigger, 2.0, 4.0, (8.0, 8.0, 8.0))
    assert one.score_of(4.0) == 2.0 and one.score_of(8.0) == 1.0 and one.score_of(math.inf) == 0.0
    assert one.name == "patch to any label"


def test_flips_count_beyond_those_of_unstamped_images() -> None:
    trigger = Trigger(torch.zeros(1, 4, 4), torch.zeros(3, 4, 4), target=1)
    labels = torch.tensor([0, 0, 2, 2])
    clean, stamped = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 1, 1, 2])
    assert excess_flips(trigger, clean, stamped, labels) == 0.5
    assert excess_flips(trigger, stamped, clean, labels) == 0.0
    assert excess_flips(trigger, labels[:0], labels[:0], labels[:0]) == 0.0
