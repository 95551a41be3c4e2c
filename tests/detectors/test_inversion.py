"""The inversion detector: scores, all-to-all and source-specific backdoors, natural triggers, and budgets."""

from __future__ import annotations

import math

import pytest
import torch

from bdprune.analysis import Case, most_outstanding, scored
from bdprune.data import CleanData
from bdprune.detectors.inversion import InversionDetector, unseen_by
from bdprune.errors import DataError
from bdprune.loops import Hypothesis, Inversion, InvertSettings, Recovery, Stage, Trigger
from bdprune.record import TRIGGER_KINDS, Evidence, TriggerKind
from bdprune.runtime import Budget

from ..written import Known, known_networks

QUICK = InvertSettings(stages=(Stage(30, 8), Stage(30, 8, keep=5)), final=Stage(20, 16, keep=1), rounds=2)


@pytest.fixture(scope="module")
def known() -> Known:
    return known_networks()


@pytest.fixture(scope="module")
def evidence(known: Known) -> Evidence:
    return InversionDetector(QUICK, ("patch",))(Case(known.backdoored, known.data))


def test_it_names_the_target_of_a_planted_trigger(known: Known, evidence: Evidence) -> None:
    assert evidence.flagged and evidence.target_label == known.target and not evidence.natural
    assert evidence.targets == () and evidence.sources == ()
    assert evidence.label_scores.index(max(evidence.label_scores, key=lambda one: one or 0.0)) == known.target


def test_the_trigger_travels_with_the_evidence(known: Known, evidence: Evidence) -> None:
    (trigger,) = evidence.triggers
    assert trigger.target_label == known.target and trigger.kind == "patch"
    assert trigger.flip_rate is not None and trigger.flip_rate >= 0.75 and 250 < trigger.images <= 270
    assert evidence.attachments and evidence.details["patch"]["image_steps"] > 0


def test_it_does_not_flag_the_clean_network(known: Known) -> None:
    found = InversionDetector(kinds=("patch",))(Case(known.clean, known.data))
    assert not found.flagged and found.target_label is None


@pytest.mark.parametrize(("tiny", "natural"), [(100.0, True), (3.0, False)])
def test_only_a_trigger_that_is_not_tiny_can_be_natural(known: Known, tiny: float, natural: bool) -> None:
    detector = InversionDetector(QUICK, ("patch",), natural=-1.0, tiny=tiny)
    found = detector(Case(known.backdoored, known.data))
    assert found.score is not None and found.score > 3.0
    assert bool(found.natural) is natural


@pytest.mark.parametrize(("tiny", "kinds"), [(3.0, {"patch"}), (100.0, {"patch", "additive"})])
def test_it_searches_further_kinds_until_a_trigger_is_tiny(known: Known, tiny: float, kinds: set[str]) -> None:
    found = InversionDetector(QUICK, ("patch", "additive"), tiny=tiny)(Case(known.backdoored, known.data))
    assert found.details.keys() == kinds


def recovered(
    target: int | None, size: float, stages: int = 2, kind: TriggerKind = "patch", rate: float | None = None
) -> Recovery:
    trigger = Trigger(torch.zeros(1, 2, 2), torch.zeros(3, 2, 2), target, flip_rate=rate, kind=kind)
    return Recovery(Hypothesis(target), size, stages, trigger)


def test_the_score_compares_the_triggers_of_the_last_stage() -> None:
    inversion = Inversion((recovered(0, 4.0), recovered(1, 20.0), recovered(2, 30.0), recovered(3, 1.0, stages=1)))
    score, best = most_outstanding(scored(inversion), 1.7, 0.75)
    assert score == pytest.approx((20 * 25) ** 0.5 / 4) and best.hypothesis.target == 0


def test_a_smaller_trigger_that_does_not_work_hides_none_that_does() -> None:
    works = Inversion((recovered(0, 5.0, rate=0.9), recovered(1, 20.0), recovered(2, 20.0)))
    fails = [
        Inversion((recovered(3, 1.0, kind="additive", rate=0.7), recovered(1, 20.0), recovered(2, 20.0))),
        Inversion((recovered(3, 2.0, rate=0.7), recovered(1, 20.0), recovered(0, 5.0, rate=0.9))),
    ]
    score, best = most_outstanding([*scored(works), *scored(fails[0])], 1.7, 0.75)
    assert best is works.recoveries[0] and score == pytest.approx(4.0)
    score, best = most_outstanding(scored(works), 4.1, 0.75)
    assert best is works.recoveries[0]  # below the threshold, the largest score counts, as before
    score, best = most_outstanding(scored(fails[1]), 1.7, 0.75)
    assert best is fails[1].recoveries[0] and score == pytest.approx((5 * 12.5) ** 0.5 / 2)


@pytest.mark.parametrize(("rate", "near"), [(0.74, True), (0.5, True), (0.49, False), (0.9, False)])
def test_a_small_trigger_that_nearly_works_is_near(known: Known, rate: float, near: bool) -> None:
    def small(target: int | None, size: float, rate: float | None = None) -> Recovery:
        trigger = Trigger(torch.zeros(1, 16, 16), torch.zeros(3, 16, 16), target, flip_rate=rate, images=270)
        return Recovery(Hypothesis(target), size, 2, trigger)

    found = Inversion((small(0, 5.0, rate), small(1, 20.0), small(2, 20.0)))
    detector, case = InversionDetector(QUICK), Case(known.clean, known.data)
    evidence = detector._evidence(case, QUICK, [found], *most_outstanding(scored(found), 1.7, 0.75))
    assert evidence.near is near and evidence.score == pytest.approx(4.0 if rate == 0.9 else 1.7)


def test_the_score_of_a_warp_counts_less() -> None:
    patches, warps = (
        Inversion((recovered(0, 10.0, kind=kind), recovered(1, 20.0, kind=kind), recovered(2, 20.0, kind=kind)))
        for kind in TRIGGER_KINDS[::2]
    )
    assert most_outstanding(scored(patches), 1.7, 0.75)[0] == pytest.approx(2.0)
    assert most_outstanding(scored(warps), 1.7, 0.75)[0] == pytest.approx(1.5)


def test_an_untargeted_trigger_is_compared_with_those_of_single_labels() -> None:
    inversion = Inversion((recovered(0, 20.0), recovered(1, 30.0), recovered(None, 5.0)))
    score, best = most_outstanding(scored(inversion), 1.7, 0.75)
    assert score == pytest.approx((20 * 25) ** 0.5 / 5) and best is inversion.recoveries[2]


def test_a_label_without_any_trigger_has_no_score() -> None:
    score, _ = most_outstanding(scored(Inversion((recovered(0, math.inf), recovered(1, math.inf)))), 1.7, 0.75)
    assert score == 0.0


def test_labels_that_no_trigger_reaches_count_with_the_largest_size() -> None:
    inversion = Inversion((recovered(0, 1.0), recovered(1, math.inf), recovered(2, math.inf)))
    score, best = most_outstanding(scored(inversion), 1.7, 0.75)
    assert score == pytest.approx(4.0) and best.hypothesis.target == 0


def test_a_trigger_of_size_zero_has_the_largest_score() -> None:
    score, best = most_outstanding(scored(Inversion((recovered(0, 0.0), recovered(1, 9.0)))), 1.7, 0.75)
    assert score == 10.0 and best.hypothesis.target == 0


def test_time_that_does_not_suffice_is_reported(known: Known) -> None:
    long = InvertSettings(stages=(Stage(5_000, 64),), rounds=0)
    case = Case(known.clean, known.data).with_budget(Budget(seconds=1.5).started())
    found = InversionDetector(long, ("patch",))(case)
    assert any("patch triggers" in one for one in found.unseen)


def test_everything_that_was_not_searched_is_named() -> None:
    skipped = (Hypothesis(4), Hypothesis(5), Hypothesis(None))
    found = unseen_by([Inversion((recovered(0, 1.0),), skipped, complete=False)])
    assert found == (
        "patch triggers to labels 4, 5",
        "patch triggers to any label",
        "patch triggers in all steps of the search",
    )
    assert unseen_by([Inversion((recovered(0, 1.0),))]) == ()


def test_it_needs_labelled_images(known: Known) -> None:
    with pytest.raises(DataError, match="needs clean images"):
        InversionDetector()(Case(known.clean))
    few = CleanData(known.data.images[:4], known.data.labels[:4])
    with pytest.raises(DataError, match="4 clean images are too few"):
        InversionDetector()(Case(known.clean, few))


def test_without_held_out_images_something_stays_unseen(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    def split(data: CleanData, *settings: object) -> tuple[CleanData, CleanData]:
        return data, data.subset(torch.empty(0, dtype=torch.int64))  # as of one image of each class

    for place in ("bdprune.detectors.inversion", "bdprune.loops.inversion.search"):
        monkeypatch.setattr(f"{place}.split_images", split)
    found = InversionDetector(QUICK, ("patch",))(Case(known.backdoored, known.data))
    assert not found.flagged and found.unseen == ("triggers on held-out images",)
    assert "no held-out image to try it on" in found.remarks[0]
