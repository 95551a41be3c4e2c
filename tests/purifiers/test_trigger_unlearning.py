"""The purifier that learns the true labels of images with recovered triggers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bdprune.analysis import Case, Outstanding, SearchFor
from bdprune.data import CleanData
from bdprune.loops import FineTuneSettings, GrowthSettings, Stamping, Trigger
from bdprune.methods import Phases
from bdprune.model import Model
from bdprune.purifiers import trigger_unlearning
from bdprune.purifiers.trigger_pruning import TriggerPruning
from bdprune.purifiers.trigger_unlearning import TriggerUnlearning
from bdprune.testing.planted import Planted, planted

from .planted_trigger import true_trigger

TUNING = FineTuneSettings(lr=0.005, epochs=4, padding=0)


@pytest.fixture(scope="module")
def known() -> Planted:
    return planted()


def never_again(case: Case, known: Outstanding, search: SearchFor, seed: int) -> Outstanding:
    """A search that finds only a large trigger."""
    return Outstanding(known.trigger, 0.5, 100.0, known.others)


def test_the_backdoor_is_unlearnt(known: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trigger_unlearning, "search_again", never_again)
    method = TriggerUnlearning(pruning=None, tuning=TUNING, stamping=Stamping(share=0.3), max_drop=0.1)
    repair = method.repaired(Case(known.backdoored, known.data), [true_trigger(known)], Phases())
    assert repair.change == "retrained" and not repair.pruned
    assert known.attack_success(repair.model) < 0.3 < known.attack_success(known.backdoored)
    assert repair.selection.endswith(f" of unlearning of the triggers (patch to label {known.target})")


def test_pruned_filters_stay_pruned_and_all_are_named(known: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trigger_unlearning, "search_again", never_again)
    method = TriggerUnlearning(pruning=TriggerPruning(fine_tuning=None), tuning=TUNING, max_drop=0.2)
    first = known.backdoored.groups[0]
    kept = {first.name: [5]}
    case = Case(known.backdoored, known.data)
    repair = method.repaired(case, [true_trigger(known)], Phases(), kept)
    assert repair.change == "pruned and retrained" and 5 in repair.pruned[first.name]
    for group in known.backdoored.groups:
        norm = group.norm
        assert norm is not None
        gamma = repair.model.network.get_parameter(f"{norm.name}.weight")
        assert not gamma[repair.pruned.get(group.name, [])].any()


def test_new_triggers_join_the_next_round(known: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    taught: list[int] = []

    class Watched(trigger_unlearning.StampedLabels):
        def __init__(self, triggers: Sequence[object], settings: Stamping, seed: int) -> None:
            taught.append(len(triggers))
            super().__init__(triggers, settings, seed)  # type: ignore[arg-type]

    monkeypatch.setattr(trigger_unlearning, "StampedLabels", Watched)
    monkeypatch.setattr(trigger_unlearning, "search_again", lambda case, one, search, seed: one)
    tuning = FineTuneSettings(lr=1e-4, epochs=1)
    method = TriggerUnlearning(pruning=None, tuning=tuning, rounds=3, taught=0.0, max_drop=1.0)
    repair = method.repaired(Case(known.backdoored, known.data), [true_trigger(known)], Phases())
    assert taught == [1, 2, 3] and repair.selection.startswith("3 rounds")


@pytest.mark.parametrize("gone, rounds", [(-0.1, 3), (1.0, 1)])
def test_a_grown_patch_is_learnt_too_until_it_is_gone(
    known: Planted, monkeypatch: pytest.MonkeyPatch, gone: float, rounds: int
) -> None:
    taught: list[list[float]] = []

    class Watched(trigger_unlearning.StampedLabels):
        def __init__(self, triggers: Sequence[Trigger], settings: Stamping, seed: int) -> None:
            taught.append([one.size for one in triggers])
            super().__init__(triggers, settings, seed)

    monkeypatch.setattr(trigger_unlearning, "StampedLabels", Watched)
    monkeypatch.setattr(trigger_unlearning, "search_again", never_again)
    method = TriggerUnlearning(
        pruning=None,
        tuning=FineTuneSettings(lr=1e-4, epochs=1),
        growth=GrowthSettings(largest=1.0),
        gone=gone,
        enough=0.6,
        rounds=3,
        taught=0.0,
        max_drop=1.0,
    )
    trigger = true_trigger(known)
    repair = method.repaired(Case(known.backdoored, known.data), [trigger], Phases())
    assert len(taught) == rounds and "grow" in repair.seconds
    assert all(len(sizes) == 2 and sizes[0] == trigger.trigger.size < sizes[1] for sizes in taught)


@pytest.mark.parametrize("score, rounds", [(0.6, 3), (0.3, 1)])
def test_the_rounds_end_when_the_trigger_is_as_large_as_others(
    known: Planted, monkeypatch: pytest.MonkeyPatch, score: float, rounds: int
) -> None:
    again = replace(true_trigger(known), score=score)
    monkeypatch.setattr(trigger_unlearning, "search_again", lambda case, one, search, seed: again)
    method = TriggerUnlearning(pruning=None, tuning=FineTuneSettings(lr=1e-4, epochs=1), rounds=3, max_drop=1.0)
    repair = method.repaired(Case(known.backdoored, known.data), [true_trigger(known)], Phases())
    assert repair.selection.startswith(f"{rounds} round")


def test_a_round_that_costs_too_much_is_not_taken(known: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trigger_unlearning, "search_again", never_again)
    method = TriggerUnlearning(pruning=None, tuning=TUNING, max_drop=-1.0)
    repair = method.repaired(Case(known.backdoored, known.data), [true_trigger(known)], Phases())
    assert repair.change == "nothing" and repair.selection.startswith("nothing is changed: a round of unlearning costs")
    state = repair.model.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in known.backdoored.network.state_dict().items())


def test_a_round_that_costs_too_much_is_repeated_with_half_the_learning_rate(
    known: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    plain = trigger_unlearning.fine_tune

    def watched(model: Model, data: CleanData, tuning: FineTuneSettings, *others: Any) -> Model:
        rates.append(tuning.lr)
        return plain(model, data, replace(tuning, lr=1e-4), *others)

    monkeypatch.setattr(trigger_unlearning, "search_again", lambda case, one, search, seed: one)
    monkeypatch.setattr(trigger_unlearning, "fine_tune", watched)
    falls = iter([0.2, 0.0, 0.2, 0.0, 0.2])  # the first rounds need a repetition each, the third has none left
    monkeypatch.setattr(trigger_unlearning, "sure_drop", lambda *_: next(falls))
    method = TriggerUnlearning(pruning=None, tuning=replace(TUNING, lr=0.004, epochs=1), halvings=2)
    repair = method.repaired(Case(known.backdoored, known.data), [true_trigger(known)], Phases())
    assert rates == [0.004, 0.002, 0.002, 0.001, 0.001] and repair.selection.startswith("2 rounds")


def test_without_a_trigger_nothing_changes(known: Planted) -> None:
    repair = TriggerUnlearning().repaired(Case(known.clean, known.data), [], Phases())
    assert repair.change == "nothing" and "no recovered trigger stands out" in repair.selection


def test_a_network_without_convolutions_is_not_pruned(known: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trigger_unlearning, "search_again", never_again)
    images = known.data.images
    network = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), known.clean.num_classes)).eval()
    model = Model(network, "linear", known.clean.num_classes, tuple(images.shape[1:]))
    method = TriggerUnlearning(tuning=TUNING, rounds=1, max_drop=1.0)
    repair = method.repaired(Case(model, known.data), [true_trigger(known)], Phases())
    assert repair.change == "retrained"


def test_the_paper_takes_one_pass_with_a_fifth_of_the_images() -> None:
    paper = TriggerUnlearning.preset("paper")
    assert (paper.rounds, paper.tuning.epochs, paper.stamping.share) == (1, 1, 0.2)
    assert paper.pruning is None and not paper.taught


def test_the_mode_reaches_the_pruning_before(known: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trigger_unlearning, "search_again", never_again)
    method = TriggerUnlearning(pruning=TriggerPruning(fine_tuning=None), tuning=TUNING, max_drop=0.2, mode="weights")
    repair = method.repaired(Case(known.backdoored, known.data), [true_trigger(known)], Phases())
    assert repair.pruned
    for name, index in repair.pruned.items():
        group = next(one for one in known.backdoored.groups if one.name == name)
        assert not repair.model.network.get_parameter(f"{group.conv}.weight")[index].any()
