"""NC+FT, NC+ABL, and both with the trigger of the unlearned network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bdprune.analysis import PUBLISHED_CLEANSING, Case
from bdprune.loops import FineTuneSettings, StampedLabels, Stamping, TargetAscent, TargetComplement, Trigger
from bdprune.purifiers.nc_abl import NCABL
from bdprune.purifiers.nc_fine_tuning import NCFineTuning
from bdprune.purifiers.nu_nc_abl import NUNCABL
from bdprune.purifiers.nu_nc_fine_tuning import NUNCFineTuning
from bdprune.runtime.evaluate import predict
from bdprune.testing.planted import Planted, planted

from .planted_trigger import true_trigger

ALL: list[type[NCFineTuning]] = [NCFineTuning, NUNCFineTuning, NCABL, NUNCABL]


@pytest.fixture(scope="module")
def known() -> Planted:
    return planted()


def _finds(trigger: Trigger | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NCFineTuning, "smallest_trigger", lambda self, case: trigger)


@pytest.mark.parametrize("method", [NCFineTuning, NCABL])
def test_a_known_trigger_is_unlearnt(
    known: Planted, method: type[NCFineTuning], monkeypatch: pytest.MonkeyPatch
) -> None:
    _finds(true_trigger(known).trigger, monkeypatch)
    tuning = FineTuneSettings(lr=0.005, epochs=6, padding=0)
    repair = method(tuning=tuning, stamping=Stamping(share=0.3), max_drop=0.1)(Case(known.backdoored, known.data))
    assert repair.change == "retrained" and repair.target_label == known.target
    assert known.attack_success(repair.model) < 0.5 < known.attack_success(known.backdoored)
    assert repair.accuracy_before - repair.accuracy_after <= 0.1


@pytest.mark.parametrize("method", ALL)
def test_a_fall_beyond_the_limit_changes_nothing(
    known: Planted, method: type[NCFineTuning], monkeypatch: pytest.MonkeyPatch
) -> None:
    _finds(true_trigger(known).trigger, monkeypatch)
    repair = method(tuning=FineTuneSettings(epochs=1, padding=0), max_drop=-1.0)(Case(known.backdoored, known.data))
    assert repair.change == "nothing" and "costs over" in repair.selection
    state = repair.model.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in known.backdoored.network.state_dict().items())


def test_without_a_trigger_nothing_changes(known: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    _finds(None, monkeypatch)
    repair = NCFineTuning()(Case(known.clean, known.data))
    assert repair.change == "nothing" and repair.selection == "nothing is changed: no trigger flips most images"


def test_the_smallest_trigger_is_that_of_the_backdoor(known: Planted) -> None:
    found = NCFineTuning().smallest_trigger(Case(known.backdoored, known.data))
    assert found is not None and found.target == known.target


def test_nu_searches_the_unlearned_network_and_repairs_the_original(known: Planted) -> None:
    case = Case(known.backdoored, known.data)
    searched = NUNCFineTuning().unlearned(case).model
    assert known.accuracy(searched) < known.accuracy(known.backdoored) - 0.1


def test_presets_have_the_published_settings() -> None:
    for method in ALL:
        paper = method.preset("paper")
        assert paper.search == PUBLISHED_CLEANSING and paper.stamping.share == 0.2
        assert method.preset("robust") == method()
    assert NCABL.preset("paper").tuning == NUNCABL.preset("paper").tuning == FineTuneSettings(lr=5e-4, epochs=5)
    assert NUNCABL.preset("paper").depth == NUNCFineTuning.preset("paper").depth == "end"  # type: ignore[attr-defined]


def test_each_method_has_its_own_objective(known: Planted) -> None:
    trigger = true_trigger(known).trigger
    kinds = [type(method()._objective(trigger)) for method in ALL]
    assert kinds == [StampedLabels, StampedLabels, TargetComplement, TargetComplement]
    papers = [type(method.preset("paper")._objective(trigger)) for method in (NCABL, NUNCABL)]
    assert papers == [TargetAscent, TargetAscent]
    assert replace(NCABL(), limit=3.0).params["limit"] == 3.0


def test_nu_takes_the_label_of_the_unlearned_network_and_the_trigger_of_the_given_one(known: Planted) -> None:
    """The unlearned network leans towards the label by itself, so its trigger was too weak for the given network."""
    case = Case(known.backdoored, known.data)
    given, unlearned = (NUNCFineTuning(trigger_of=one).smallest_trigger(case) for one in ("given", "unlearned"))
    assert given is not None and unlearned is not None and given.target == unlearned.target

    def flips(trigger: Trigger) -> float:
        images = known.data.images[known.data.labels != trigger.target]
        return float((predict(known.backdoored.module, trigger.apply(images)) == trigger.target).float().mean())

    assert flips(given) > 0.8 and flips(given) >= flips(unlearned)
