"""Trigger inversion: it finds the planted trigger, keeps its promises on time, and treats stacks as single models."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from bdprune.data import CleanData
from bdprune.errors import DataError, OptionError
from bdprune.loops import Hypothesis, Inversion, InvertSettings, Stage, Trigger, every_target, invert, split_images
from bdprune.loops.inversion.search import Search
from bdprune.model import Model
from bdprune.runtime import FrozenNetworks, attack_success_rate, predict
from bdprune.testing.planted import planted

from ...helpers import siblings
from ...written import Known, known_networks

QUICK = InvertSettings(stages=(Stage(30, 8), Stage(30, 8, keep=3)), final=Stage(20, 16, keep=1), rounds=2)


@pytest.fixture(scope="module")
def known() -> Known:
    return known_networks()


@pytest.fixture(scope="module")
def found(known: Known) -> Inversion:
    return invert([known.backdoored], known.data, every_target(10), QUICK)[0]


def counted(known: Known, data: CleanData, trigger: Trigger) -> int:
    """The held-out images that a trigger is about and that the backdoored network labels correctly."""
    held = split_images(data, QUICK, 0)[1]
    right = predict(known.backdoored.module, held.images) == held.labels
    return int((trigger.takes(held.labels) & right).sum())


def test_the_smallest_trigger_leads_to_the_target(known: Known, found: Inversion) -> None:
    smallest = min(found.recoveries, key=lambda one: one.size)
    assert smallest.hypothesis.target == known.target
    others = sorted(one.size for one in found.recoveries if one is not smallest)
    assert smallest.size < 0.6 * others[0]


def test_the_final_trigger_flips_images_that_the_search_never_saw(known: Known, found: Inversion) -> None:
    trigger = min(found.recoveries, key=lambda one: one.size).trigger
    assert trigger.flip_rate is not None and trigger.flip_rate >= QUICK.flip_rate
    assert trigger.images == counted(known, known.data, trigger)
    goal = torch.full_like(known.test.labels, known.target)
    rate = attack_success_rate(known.backdoored.module, known.test.images, known.test.labels, trigger.apply, goal)
    assert rate >= 0.85


def test_losers_drop_out(found: Inversion) -> None:
    assert sorted(one.stages for one in found.recoveries) == [1] * 8 + [2] * 3
    kept = [one.size for one in found.recoveries if one.stages == 2]
    assert max(kept) <= min(one.size for one in found.recoveries if one.stages == 1)
    assert sum(one.trigger.flip_rate is not None for one in found.recoveries) == 1


def test_the_same_seed_gives_the_same_triggers(known: Known, found: Inversion) -> None:
    again = invert([known.backdoored], known.data, every_target(10), QUICK)[0]
    assert [one.size for one in again.recoveries] == [one.size for one in found.recoveries]
    other = invert([known.backdoored], known.data, every_target(10), QUICK, seed=1)[0]
    assert [one.size for one in other.recoveries] != [one.size for one in found.recoveries]


def test_a_stack_gives_what_its_models_give(known: Known) -> None:
    models = siblings(known.clean, 2)
    both = invert(models, known.data, every_target(10), QUICK)
    for model, stacked in zip(models, both, strict=True):
        alone = invert([model], known.data, every_target(10), QUICK)[0]
        assert [one.stages for one in stacked.recoveries] == [one.stages for one in alone.recoveries]
        for ours, theirs in zip(stacked.recoveries, alone.recoveries, strict=True):
            assert ours.size == pytest.approx(theirs.size, rel=0.05)


def test_additive_triggers_are_found_too(known: Known) -> None:
    hypotheses = [Hypothesis(label, kind="additive") for label in (known.target, 0)]
    ours, other = invert([known.backdoored], known.data, hypotheses, QUICK)[0].recoveries
    assert ours.trigger.mask is None and ours.size < other.size


def test_kinds_keep_the_order_of_the_hypotheses(known: Known) -> None:
    hypotheses = [Hypothesis(1, kind="additive"), Hypothesis(2), Hypothesis(3, kind="additive"), Hypothesis(None)]
    few = InvertSettings(stages=(Stage(2, 2),), final=Stage(1, 1, keep=1), rounds=0)
    result = invert([known.clean], known.data, hypotheses, few)[0]
    assert [one.hypothesis for one in result.recoveries] == hypotheses
    assert [one.kind for one in result.triggers] == ["additive", "patch", "additive", "patch"]


def test_images_come_only_from_the_sources(known: Known) -> None:
    hypothesis = Hypothesis(known.target, sources=(1, 2))
    trigger = invert([known.backdoored], known.data, [hypothesis], QUICK)[0].triggers[0]
    assert trigger.sources == (1, 2) and trigger.images == counted(known, known.data, trigger) <= 60


def test_the_time_limit_skips_the_last_hypotheses(known: Known) -> None:
    start = time.perf_counter()
    long = InvertSettings(stages=(Stage(10_000, 64),))
    result = invert([known.clean], known.data, every_target(10), long, seconds=1.0)[0]
    assert time.perf_counter() - start < 6
    assert not result.complete and len(result.recoveries) + len(result.skipped) == 11
    assert result.recoveries[0].hypothesis.target == 0 and result.skipped


def test_a_time_limit_leaves_out_images_of_a_slow_network(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdprune.loops.inversion.timing.step_seconds", lambda networks, images: 1.0)
    result = invert([known.clean], known.data, [Hypothesis(None)], QUICK, seconds=100.0)[0]
    assert result.complete and 18 <= result.triggers[0].images <= 20  # 0.1 * 100 s * 2 passes a second


def test_further_rounds_keep_the_trigger_that_flips_most(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([[0.6, 0.95], [0.85, 0.99], [0.7, 0.97], [0.8, 0.98]])
    noted: list[dict[int, float]] = []
    original = Search._note_triggers

    def note(self: Search, rates: Sequence[float] | None = None, *more: Any) -> None:
        if rates is not None:
            places = range(len(rates)) if len(more) < 2 else more[1]
            noted.append({place: rates[place] for place in places})
        original(self, rates, *more)

    monkeypatch.setattr(Search, "_held_out_rates", lambda self: (next(measured), [270, 270]))
    monkeypatch.setattr(Search, "_note_triggers", note)
    settings = replace(QUICK, final=Stage(2, 4, keep=2), rounds=3)
    found = invert([known.backdoored], known.data, every_target(10), settings)[0]
    # The second one had reached 0.9 at once, so its first and smallest trigger stays.
    assert noted == [{0: 0.6, 1: 0.95}, {0: 0.85}, {}, {}]
    assert sorted(one.trigger.flip_rate for one in found.recoveries if one.trigger.flip_rate is not None) == [
        0.85,
        0.95,
    ]


@pytest.mark.parametrize("only_right", [True, False])
def test_images_that_the_model_labels_wrong_are_no_flips(known: Known, only_right: bool) -> None:
    settings = replace(QUICK, only_right=only_right)
    labels, target = known.data.labels.clone(), known.target
    labels[labels == 1] = 2  # the network says 1
    wrong = replace(known.data, labels=labels)
    trigger = invert([known.backdoored], wrong, [Hypothesis(target)], settings)[0].triggers[0]
    held = split_images(wrong, settings, 0)[1]
    right = predict(known.backdoored.module, held.images) == held.labels
    counted = (held.labels != target) & (right if only_right else True)
    assert (
        trigger.images == int(counted.sum()) and (int(counted.sum()) < int((held.labels != target).sum())) is only_right
    )


@pytest.mark.parametrize(("factor", "strengthened"), [(0.0, True), (1.0, True), (1e6, False)])
def test_only_triggers_that_stand_out_are_strengthened(known: Known, factor: float, strengthened: bool) -> None:
    settings = replace(QUICK, flip_rate=1.0, outstanding=factor)
    searched = sum(stage.steps * stage.images * (stage.keep or 11) for stage in settings.stages)
    result = invert([known.clean], known.data, every_target(10), settings)[0]
    assert (result.image_steps > searched) is strengthened
    assert sum(one.trigger.flip_rate is not None for one in result.recoveries) == settings.final.keep


@pytest.mark.parametrize(
    ("sizes", "outstanding"),
    [
        ([10.0, 13.0, 60.0, 10.5], True),  # the untargeted trigger, the last one, is none of the others: score 2.18
        ([10.0, 11.0, 12.0, 10.5], False),
        ([10.0, 13.0, math.inf, 10.5], True),
        ([math.inf] * 4, False),
        ([30.0, 30.0, 31.0, 10.0], True),  # the untargeted trigger itself
    ],
)
def test_a_trigger_stands_out_among_those_with_a_target(known: Known, sizes: list[float], outstanding: bool) -> None:
    networks, settings = FrozenNetworks([known.clean], known.data.images), replace(QUICK, outstanding=1.7)
    wanted = [Hypothesis(0), Hypothesis(1), Hypothesis(2), Hypothesis(None)]
    search = Search(networks, split_images(known.data, settings, 0), wanted, settings, torch.Generator())
    search._hypotheses, search._members = wanted, torch.arange(4)
    assert search._has_outstanding(torch.tensor([sizes]), 0) is outstanding


def test_a_stack_strengthens_each_model_as_if_it_were_alone(known: Known) -> None:
    toys = planted()
    settings = replace(QUICK, outstanding=1.5)
    together = invert([toys.clean, toys.backdoored], known.data, every_target(10), settings)
    for model, found in zip((toys.clean, toys.backdoored), together, strict=True):
        alone = invert([model], known.data, every_target(10), settings)[0]
        rates = [[one.trigger.flip_rate for one in result.recoveries] for result in (found, alone)]
        assert [one is None for one in rates[0]] == [one is None for one in rates[1]]
        known_ones = [[one for one in row if one is not None] for row in rates]
        assert known_ones[0] == pytest.approx(known_ones[1], abs=0.02)


def test_a_hypothesis_without_images_is_skipped(known: Known) -> None:
    data = known.data.subset((known.data.labels != 5).nonzero().flatten())
    few = InvertSettings(stages=(Stage(2, 2),), final=Stage(1, 1, keep=1), rounds=0)
    result = invert([known.clean], data, [Hypothesis(1), Hypothesis(1, sources=(5,))], few)[0]
    assert [one.hypothesis for one in result.recoveries] == [Hypothesis(1)]
    assert result.skipped == (Hypothesis(1, sources=(5,)),)


def test_no_image_at_all_is_an_error(known: Known) -> None:
    only = known.data.subset(torch.tensor([0]))
    with pytest.raises(DataError, match="no image to search with"):
        invert([known.clean], only, [Hypothesis(int(only.labels[0]))])


def test_progress_covers_all_kinds(known: Known) -> None:
    few = InvertSettings(stages=(Stage(2, 2), Stage(1, 2)), final=Stage(3, 1, keep=1), rounds=0)
    seen: list[tuple[int, int]] = []
    hypotheses = [Hypothesis(1), Hypothesis(1, kind="additive")]
    invert([known.clean], known.data, hypotheses, few, progress=lambda step, steps: seen.append((step, steps)))
    assert seen == [(step, 6) for step in range(1, 7)]


def test_the_model_does_not_change(known: Known) -> None:
    before = {name: value.clone() for name, value in known.clean.network.state_dict().items()}
    few = InvertSettings(stages=(Stage(2, 2),), final=Stage(1, 1, keep=1), rounds=1)
    invert([known.clean], known.data, [Hypothesis(1)], few)
    assert all(torch.equal(value, before[name]) for name, value in known.clean.network.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in known.clean.network.parameters())


@pytest.mark.parametrize("wrong", [{"stages": ()}, {"rounds": -1}, {"success": 1.0}, {"held_out": 0.0}, {"lr": 0.0}])
def test_wrong_settings_are_errors(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="rigger inversion"):
        InvertSettings(**wrong)  # type: ignore[arg-type]


def test_a_network_that_ignores_its_input_gives_infinite_sizes(known: Known) -> None:
    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.arange(10.0))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.bias + 0 * images.flatten(1).sum(1, keepdim=True)

    model = Model(Constant().eval(), "constant", 10, (3, 16, 16))
    few = InvertSettings(stages=(Stage(3, 2),), final=Stage(1, 1, keep=1), rounds=1)
    result = invert([model], CleanData(known.data.images, known.data.labels), [Hypothesis(1), Hypothesis(2)], few)[0]
    assert [one.size for one in result.recoveries] == [float("inf")] * 2


def test_a_model_without_its_task_can_be_searched_with_all_images(known: Known) -> None:
    wrong = CleanData(known.data.images, (known.data.labels + 1) % 10)
    few = InvertSettings(stages=(Stage(2, 2),), final=Stage(1, 1, keep=1), rounds=0)
    sure = known.clean.module(known.data.images).argmax(1) == known.data.labels
    wrong = wrong.subset(sure.nonzero().flatten())
    with pytest.raises(DataError, match="no image to search with"):
        invert([known.clean], wrong, every_target(10), few)
    result = invert([known.clean], wrong, every_target(10), replace(few, only_right=False))[0]
    assert len(result.recoveries) == 11 and not result.skipped
