"""The purifier that prunes the filters which recovered triggers raise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bdprune.analysis import Case
from bdprune.loops import FineTuneSettings
from bdprune.methods import Phases
from bdprune.model import last_group
from bdprune.purifiers.trigger_pruning import TriggerPruning, highest
from bdprune.testing.planted import Planted, planted

from .planted_trigger import true_trigger


@pytest.fixture(scope="module")
def known() -> Planted:
    return planted()


def test_a_planted_backdoor_is_pruned_away_at_a_small_cost(known: Planted) -> None:
    method = TriggerPruning(fine_tuning=None)
    repair = method.repaired(Case(known.backdoored, known.data), [true_trigger(known)], Phases())
    assert repair.change == "pruned" and repair.target_label == known.target
    assert known.attack_success(known.backdoored) > 0.9 and known.attack_success(repair.model) < 0.1
    assert repair.accuracy_before - repair.accuracy_after <= method.max_drop
    assert [point.filters_pruned for point in repair.curve] == sorted(point.filters_pruned for point in repair.curve)
    assert sum(map(len, repair.pruned.values())) in [point.filters_pruned for point in repair.curve]


def test_the_paper_stops_when_the_trigger_no_longer_works(known: Planted) -> None:
    case, triggers = Case(known.backdoored, known.data), [true_trigger(known)]
    whole = TriggerPruning(fine_tuning=None, max_drop=1.0)
    stopped = replace(whole, stop="flips")
    far, short = (one.repaired(case, triggers, Phases()) for one in (whole, stopped))
    assert 0 < sum(map(len, short.pruned.values())) < sum(map(len, far.pruned.values()))
    last = TriggerPruning.preset("paper").repaired(case, triggers, Phases())
    assert set(last.masks) == {last_group(known.backdoored.groups).name} == set(last.pruned) | set(last.masks)


def test_a_fine_tuning_follows_only_if_the_trigger_still_works(known: Planted) -> None:
    case, triggers = Case(known.backdoored, known.data), [true_trigger(known)]
    tuning = FineTuneSettings(epochs=1, padding=0)
    ended = TriggerPruning(fine_tuning=tuning).repaired(case, triggers, Phases())
    assert ended.change == "pruned"
    never = TriggerPruning(fine_tuning=tuning, gone=-1.0, max_drop=0.0, tuned_drop=0.3)
    tuned = never.repaired(case, triggers, Phases())
    assert tuned.change == "pruned and retrained" and tuned.selection.endswith("then fine-tuned")
    for name, index in tuned.pruned.items():
        norm = next(group.norm for group in known.backdoored.groups if group.name == name)
        assert norm is not None
        assert not tuned.model.network.get_parameter(f"{norm.name}.weight")[[norm.start + one for one in index]].any()


def test_a_fine_tuning_that_does_not_regain_the_accuracy_is_not_used(known: Planted) -> None:
    case, triggers = Case(known.backdoored, known.data), [true_trigger(known)]
    method = TriggerPruning(fine_tuning=FineTuneSettings(lr=3.0, epochs=1, padding=0), gone=-1.0, tuned_drop=0.3)
    repair = method.repaired(case, triggers, Phases())
    assert repair.change == "pruned" and repair.accuracy_before - repair.accuracy_after <= method.max_drop


def test_without_a_trigger_nothing_changes(known: Planted) -> None:
    repair = TriggerPruning().repaired(Case(known.clean, known.data), [], Phases())
    assert repair.change == "nothing" and repair.selection == "nothing is pruned: no recovered trigger stands out"


def test_a_guard_that_nothing_keeps_prunes_nothing(known: Planted) -> None:
    method = TriggerPruning(fine_tuning=None, max_drop=-1.0)
    repair = method.repaired(Case(known.backdoored, known.data), [true_trigger(known)], Phases())
    assert repair.change == "nothing" and repair.selection.startswith("nothing is pruned: even the first filters")


def test_the_highest_ranks_of_all_groups_are_chosen() -> None:
    ranks = {"a": torch.tensor([0.0, 5.0, 1.0]), "b": torch.tensor([4.0, 3.0])}
    assert highest(ranks, 3) == {"a": [1], "b": [0, 1]}
    assert highest(ranks, 0) == {}
