"""The purifier that tries methods until clean images show no sign of the backdoor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from bdprune.analysis import Case, Signs
from bdprune.data import CleanData
from bdprune.errors import DataError, OptionError, TrainingError
from bdprune.methods import Phases, Repair, accuracy_on, hold_out
from bdprune.model import Model
from bdprune.purifiers import auto
from bdprune.purifiers.auto import Auto
from bdprune.purifiers.ibau import IBAU
from bdprune.purifiers.rnp import RNP
from bdprune.purifiers.trigger_unlearning import TriggerUnlearning, unlearn_after
from bdprune.record import RepairCheck, TriggerCheck
from bdprune.testing.planted import Planted, planted

from .planted_trigger import true_trigger

Methods = list[tuple[str, Callable[[Case], Repair]]]


@pytest.fixture(scope="module")
def known() -> Planted:
    return planted()


def _signs(known: Planted, found: bool = True) -> Signs:
    _, held = hold_out(known.data, 0.3, 0)
    trigger = true_trigger(known)
    return Signs((trigger,) if found else (), None, None, known.target if found else None, held)


def _few(known: Planted) -> CleanData:
    """One image of each of the ten labels."""
    return known.data.sample(1, torch.Generator().manual_seed(0))


def broken(case: Case) -> Repair:
    raise TrainingError("The loss is nan.", "Lower the learning rate.")


@pytest.fixture
def trial(known: Planted, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Repair]:
    """Runs ``Auto`` on the planted network with given methods, and a check that measures the true trigger."""

    def measured(case: Case, repaired: Model, signs: Signs, *more: Any) -> RepairCheck:
        flips = known.attack_success(repaired)
        one = TriggerCheck(
            name="patch", flips_before=1.0, flips_after=flips, score_before=4.0, score_after=1.0, reactivated=0.0
        )
        return RepairCheck(triggers=(one,), left=("it flips images",) if flips > 0.1 else ())

    def run(methods: Methods, further: Callable[[Case], Repair] = broken, **settings: Any) -> Repair:
        monkeypatch.setattr(auto, "signs_of", lambda *args: _signs(known))
        monkeypatch.setattr(auto, "unlearn_after", lambda case, *more: further(case))
        monkeypatch.setattr(auto, "check_repair", measured)
        monkeypatch.setattr(Auto, "_candidates", lambda self, signs: iter(methods))
        return Auto(**settings)(Case(known.backdoored, known.data))

    return run


def gives(known: Planted, model: Model, **fields: Any) -> Callable[[Case], Repair]:
    """A method with this result."""

    def method(case: Case) -> Repair:
        _, held = hold_out(case.images, 0.3, 0)
        made = RNP().repair(case, model, held, retrained=True, selection="because the test says so")
        return replace(made, **fields)

    return method


def ignorant(known: Planted) -> Model:
    """A copy whose head is zero, which predicts the same label for each image."""
    model = known.clean.clone()
    with torch.no_grad():
        for parameter in list(model.network.parameters())[-2:]:
            parameter.zero_()
    return model


def test_the_first_result_without_a_sign_is_taken(trial: Callable[..., Repair], known: Planted) -> None:
    done = trial([("bad", gives(known, known.backdoored)), ("good", gives(known, known.clean)), ("later", broken)])
    assert done.model is known.clean and done.method == "bdprune.auto"
    assert [(one.method, one.chosen, bool(one.left)) for one in done.attempts] == [
        ("bad", False, True),
        ("good", True, False),
        ("good+trigger_unlearning", False, False),
    ]
    assert done.check is not None and done.check.outcome == "repaired" and done.target_label == known.target
    assert done.selection.startswith("good, of 3 tried: no sign of the backdoor is left")
    assert set(done.seconds) == {"signs", "bad", "good", "good+trigger_unlearning"}


def test_the_triggers_are_unlearned_after_a_repair_without_it(trial: Callable[..., Repair], known: Planted) -> None:
    other = known.clean.clone()
    done = trial([("good", gives(known, known.clean))], further=gives(known, other))
    assert done.model is other and [one.chosen for one in done.attempts] == [False, True]
    assert done.selection.startswith("good+trigger_unlearning, of 2 tried: no sign of the backdoor is left")
    worse = trial([("good", gives(known, known.clean))], further=gives(known, known.backdoored))
    assert worse.model is known.clean and worse.attempts[-1].left, "a sign came back"
    unlearned = trial([("rnp+trigger_unlearning", gives(known, known.clean))], further=gives(known, other))
    assert unlearned.model is known.clean and len(unlearned.attempts) == 1
    left = trial([("bad", gives(known, known.backdoored))], further=gives(known, other))
    assert left.model is known.backdoored and len(left.attempts) == 1


def test_costly_failing_and_idle_methods_are_named_and_not_taken(trial: Callable[..., Repair], known: Planted) -> None:
    methods = [
        ("broken", broken),
        ("idle", gives(known, known.backdoored, change="nothing", selection="nothing stood out")),
        ("costly", gives(known, ignorant(known), accuracy_before=0.9, accuracy_after=0.1)),
        ("bad", gives(known, known.backdoored)),
    ]
    done = trial(methods)
    assert [one.rejected for one in done.attempts] == [
        "The loss is nan. Lower the learning rate.",
        "nothing stood out",
        "it costs 80.0 points of clean accuracy",
        "",
    ]
    assert done.check is not None and done.check.outcome == "unrepaired"
    assert "it leaves the fewest signs" in done.selection and [one.chosen for one in done.attempts][-1]


def test_the_same_pruning_is_not_checked_twice(trial: Callable[..., Repair], known: Planted) -> None:
    same = gives(known, known.backdoored, change="pruned", pruned={"a": [1]})
    done = trial([("one", same), ("two", same)])
    assert [one.rejected for one in done.attempts] == ["", "it prunes the same filters as one"]


def test_without_an_acceptable_result_nothing_changes(trial: Callable[..., Repair], known: Planted) -> None:
    done = trial([("broken", broken)])
    assert done.change == "nothing" and done.model is known.backdoored
    assert done.check is not None and done.check.outcome == "unrepaired"


def test_without_a_sign_the_outcome_is_unverified(known: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "signs_of", lambda *args: _signs(known, found=False))
    asked: list[tuple[float, float]] = []

    def careful(self: IBAU, case: Case) -> Repair:
        asked.append((self.max_drop, max(self.ways)))
        return gives(known, known.clean, change="retrained")(case)

    monkeypatch.setattr(IBAU, "__call__", careful)
    done = Auto(safe_drop=0.001)(Case(known.clean, known.data))
    assert done.check is not None and done.check.outcome == "unverified" and asked == [(0.001, 0.2)]
    (one,) = done.attempts
    assert one.chosen and one.seconds == done.seconds["ibau"]
    assert done.selection.startswith("no sign of a backdoor was found") and done.target_label is None
    monkeypatch.setattr(IBAU, "__call__", lambda self, case: gives(known, known.clean, change="nothing")(case))
    (one,) = Auto()(Case(known.clean, known.data)).attempts
    assert not one.chosen and one.rejected == "because the test says so"


def test_a_network_that_cannot_be_trained_stays_unverified(known: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: IBAU, case: Case) -> Repair:
        raise TrainingError("The loss is not finite.", "")

    monkeypatch.setattr(auto, "signs_of", lambda *args: _signs(known, found=False))
    monkeypatch.setattr(IBAU, "__call__", fail)
    done = Auto()(Case(known.clean, known.data))
    assert done.check is not None and done.check.outcome == "unverified" and done.change == "nothing"
    assert done.selection.endswith("and I-BAU cannot run: The loss is not finite.")


def test_without_a_sign_the_network_changes_little(known: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "signs_of", lambda *args: _signs(known, found=False))
    done = Auto()(Case(known.clean, known.data))
    assert known.accuracy(done.model) > known.accuracy(known.clean) - 0.01


def test_few_images_are_seen_in_many_views(known: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    few = _few(known)
    seen: list[tuple[Auto, CleanData]] = []

    def by_images(self: Auto, case: Case) -> Repair:
        seen.append((self, case.images))
        return gives(known, known.clean, selection="a method")(case)

    monkeypatch.setattr(Auto, "_by_images", by_images)
    done = Auto(max_drop=0.02)(Case(known.backdoored, few))
    (method, views) = seen[0]
    assert len(views) == 500 and method._limit(method.max_drop) == pytest.approx(0.1) and method._limit(0.5) == 1.0
    assert done.params == Auto(max_drop=0.02).params
    assert done.accuracy_before == accuracy_on(known.backdoored, few)
    assert done.accuracy_after == accuracy_on(known.clean, few)
    assert done.selection.startswith(
        "a method; the held-out images are 150 views of the 10 images that it learns from, and "
    )
    for count, views, tolerance in ((50, 500, 3.0), (149, 596, 3.0), (150, 150, 1.0)):
        Auto()(Case(known.backdoored, known.data.spread(count)))
        assert (len(seen[-1][1]), seen[-1][0].tolerance) == (views, tolerance)
    with pytest.raises(DataError, match="too few"):
        Auto()(Case(known.backdoored, _few(known).spread(9)))


def test_a_repair_that_costs_few_images_too_much_is_not_used(known: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    ruined = gives(known, ignorant(known), check=RepairCheck(lead_before=0.5), target_label=3)
    monkeypatch.setattr(Auto, "_by_images", lambda self, case: ruined(case))
    done = Auto()(Case(known.backdoored, _few(known)))
    assert done.change == "nothing" and done.accuracy_after == done.accuracy_before
    assert done.check is not None and done.check.outcome == "unrepaired" and done.target_label == 3
    assert "points of clean accuracy on the 10 images" in done.check.left[0]


def test_a_fall_of_exactly_the_limit_is_used(known: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Auto, "_by_images", lambda self, case: gives(known, known.clean)(case))
    monkeypatch.setattr(auto, "accuracy_on", lambda model, data: 0.9 if model is known.backdoored else 0.7)
    done = Auto()(Case(known.backdoored, _few(known)))
    assert 0.9 - 0.7 > 0.2 and done.model is known.clean, "two of ten images, whatever the rounding"


def test_a_tolerance_scales_all_limits(known: Planted) -> None:
    method = Auto(tolerance=3.0)
    (rnp,) = [one for name, one in method._candidates(_signs(known)) if name == "rnp"]
    assert rnp.method.max_drop == pytest.approx(0.06)  # type: ignore[attr-defined]
    assert method._unlearning().max_drop == pytest.approx(0.09) and Auto()._unlearning().max_drop == 0.03


@pytest.mark.parametrize("settings", [{"tolerance": 0.0}, {"views_tolerance": (5.0, 0.0)}, {"views_tolerance": (5.0,)}])
def test_factors_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="tolerance of Auto is"):
        Auto(**settings)


def test_methods_come_in_the_order_of_their_cost(known: Planted) -> None:
    names = [name for name, _ in Auto()._candidates(_signs(known))]
    assert names == ["trigger_pruning", "rnp", "trigger_pruning+fine_tuning", "trigger_unlearning"]
    assert [name for name, _ in Auto()._candidates(_signs(known, found=False))] == ["rnp", "ibau"]


def test_two_methods_in_turn_keep_both_prunings(known: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    group = known.backdoored.groups[0].name
    first = gives(
        known, known.clean, pruned={group: [2]}, change="pruned", accuracy_before=0.75, threshold=0.2, curve=(1,)
    )
    seen: list[dict[str, list[int]]] = []

    def second(self: TriggerUnlearning, case: Case, triggers: Any, phase: Phases, kept: Any) -> Repair:
        seen.append(kept)
        return gives(known, known.clean, pruned={group: [1]}, change=change)(case)

    change = "retrained"
    monkeypatch.setattr(TriggerUnlearning, "repaired", second)
    case = Case(known.backdoored, known.data)
    done = unlearn_after(case, first(case), TriggerUnlearning(), _signs(known).triggers)
    assert done.pruned == {group: [1, 2]} and done.change == "pruned and retrained" and done.accuracy_before == 0.75
    assert seen == [{group: [2]}] and (done.threshold, done.curve) == (0.2, (1,))
    change = "pruned"
    with pytest.raises(TrainingError, match="the same as the result before it"):
        unlearn_after(case, first(case), TriggerUnlearning(), _signs(known).triggers)


def test_rnp_runs_once_and_goes_on_only_if_it_changed_something(
    known: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Repair] = []

    def run(self: RNP, case: Case) -> Repair:
        ran.append(gives(known, known.clean, pruned={}, change=change)(case))
        return ran[-1]

    monkeypatch.setattr(RNP, "__call__", run)
    monkeypatch.setattr(auto, "unlearn_after", lambda case, before, *more: before)
    case = Case(known.backdoored, known.data)
    for change in ("pruned", "nothing"):
        ran.clear()
        names = []
        for name, method in Auto()._candidates(_signs(known)):
            names.append(name)
            if "rnp" in name:
                assert method(case) is ran[0]
        after_rnp = ["rnp+trigger_unlearning"] if change == "pruned" else []
        assert len(ran) == 1 and names[-1 - len(after_rnp) :] == ["trigger_unlearning", *after_rnp]


def test_settings_reach_all_methods(known: Planted) -> None:
    method = Auto(mode="weights", seed=7, precision="float32", held_out=0.4)
    found: Iterator[Any] = method._candidates(_signs(known))
    rnp = dict(found)["rnp"].method
    assert (rnp.mode, rnp.seed, rnp.precision, rnp.held_out) == ("weights", 7, "float32", 0.4)
    assert torch.tensor(method.params["criteria"]["gone"]) == torch.tensor(0.1)
