"""Verdicts from evidence: two kinds make a model backdoored, and clean needs a look at everything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdprune.analysis import Case, Sanity
from bdprune.detectors.lipschitz import LipschitzDetector
from bdprune.detectors.moved_filters import MovedFiltersDetector
from bdprune.detectors.unlearning import UnlearningDetector
from bdprune.methods import Detector
from bdprune.record import Evidence, Rule, nothing_seen
from bdprune.verdict.judgement import Judgement, evidence_risk, with_p_value
from bdprune.verdict.judgement import judge as judge_by

SANE = Sanity(0.93, True, "Clean accuracy is 93.0 % on 500 images.")
INSANE = Sanity(0.12, False, "Clean accuracy is 12.0 %.", "Pass --normalize imagenet.")
COLLAPSE, FILTERS, MOVED = UnlearningDetector.id, LipschitzDetector.id, MovedFiltersDetector.id
TRIGGER, PRUNING, OTHER = "x.trigger", "x.pruning", "x.third"


@dataclass(frozen=True)
class Third(Detector):
    """A detector of another package, which corroborates."""

    id = OTHER
    title = "a third opinion"
    rule = Rule(id="BD500", name="third", help="A third opinion.")

    def __call__(self, case: Case) -> Evidence:
        raise NotImplementedError


@dataclass(frozen=True)
class Trigger(Third):
    id = TRIGGER
    sign = "trigger"


@dataclass(frozen=True)
class SecondTrigger(Trigger):
    id = "x.trigger2"


@dataclass(frozen=True)
class Pruning(Third):
    id = PRUNING
    sign = "pruning"


MADE = (
    UnlearningDetector(),
    LipschitzDetector(),
    MovedFiltersDetector(),
    Third(),
    Trigger(),
    SecondTrigger(),
    Pruning(),
)
DETECTORS: dict[str, Detector] = {one.id: one for one in MADE}


def judge(evidence: Sequence[Evidence], sanity: Sanity | None = SANE) -> Judgement:
    """The verdict where exactly the detectors with evidence ran."""
    return judge_by([DETECTORS[one.detector] for one in evidence], evidence, sanity)


def seen(name: str, score: float, label: int | None = 8, **more: Any) -> Evidence:
    """Evidence with threshold 0.5; only flagged evidence names a label."""
    named = label if score > 0.5 and not more.get("targets") else None
    return Evidence(detector=name, score=score, threshold=0.5, flagged=score > 0.5, target_label=named, **more)


def collapse(score: float, label: int | None = 8, **more: Any) -> Evidence:
    return seen(COLLAPSE, score, label, **more)


def trigger(score: float, label: int | None = 8, **more: Any) -> Evidence:
    return seen(TRIGGER, score, label, **more)


def rules(found: Judgement) -> list[str]:
    return [one.rule_id for one in found.findings]


QUIET = (collapse(0.2), trigger(0.1))


def test_a_look_at_both_kinds_without_a_finding_is_clean() -> None:
    found = judge([*QUIET, seen(FILTERS, 0.3)])
    assert (found.verdict, found.target_label, found.findings) == ("clean", None, ())
    assert found.risk is not None and found.risk < 0.5


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        ([collapse(0.2)], "No detector looked for a recovered trigger"),
        ([trigger(0.2)], "No detector looked for a collapse"),
        ([seen(PRUNING, 0.2), seen(FILTERS, 0.1)], "No detector looked for a collapse"),
        ([], "(detectors: none)"),
        ([collapse(0.2), trigger(0.2, unseen=("labels 200 to 999",))], "did not look at labels 200 to 999."),
        ([collapse(0.2, not_applicable="No batch norm."), trigger(0.2)], "No batch norm."),
    ],
)
def test_without_a_full_look_at_both_kinds_it_is_never_clean(evidence: list[Evidence], words: str) -> None:
    found = judge(evidence)
    assert (found.verdict, found.risk) == ("inconclusive", None)
    assert words in found.findings[0].message


def test_a_second_detector_of_a_kind_can_look_where_the_first_could_not() -> None:
    assert judge([collapse(0.2), trigger(0.2, unseen=("label 3",)), seen("x.trigger2", 0.1)]).verdict == "clean"


WHY = "It counts only beside another kind."


def test_evidence_that_only_supports_is_no_finding_against_a_model() -> None:
    pairs = seen("x.trigger2", 0.9, sources=(2,), supporting=WHY)
    found = judge([*QUIET, pairs])
    assert (found.verdict, found.target_label, found.sources) == ("clean", None, ())
    assert rules(found) == ["BD500"] and WHY in found.findings[0].message and found.findings[0].severity == "low"


@pytest.mark.parametrize("label", [3, 8])
@pytest.mark.parametrize(
    "others",
    [
        [collapse(0.9), trigger(0.1)],
        [collapse(0.9), seen(PRUNING, 0.9)],
        [collapse(0.9), trigger(0.9)],
        [collapse(0.9, targets=(3, 8)), trigger(0.9)],
        [collapse(0.9), seen(PRUNING, 0.9, 2)],
        [trigger(0.9)],
    ],
)
def test_evidence_that_only_supports_changes_no_other_verdict(others: list[Evidence], label: int) -> None:
    alone = judge(others)
    found = judge([*others, seen("x.trigger2", 0.9, label, sources=(2,), supporting=WHY)])
    if (alone.verdict, label) == ("suspicious", 8) and others[0].detector == COLLAPSE and not others[1].flagged:
        assert (found.verdict, found.target_label, found.sources) == ("backdoored", 8, (2,))
    else:
        assert (found.verdict, found.target_label, found.targets) == (alone.verdict, alone.target_label, alone.targets)
        assert found.sources == alone.sources == ()


def test_evidence_that_only_supports_does_not_replace_a_full_look() -> None:
    found = judge([collapse(0.2), trigger(0.2, unseen=("label 3",)), seen("x.trigger2", 0.1, supporting=WHY)])
    assert found.verdict == "inconclusive"


@pytest.mark.parametrize("pair", list(itertools.combinations((COLLAPSE, TRIGGER, PRUNING), 2)))
def test_any_two_kinds_with_one_label_are_a_backdoor(pair: tuple[str, str]) -> None:
    found = judge([seen(name, 0.9) for name in pair])
    assert (found.verdict, found.target_label, found.targets) == ("backdoored", 8, ())
    assert rules(found)[-1] == "BD101" and "AML.T0018.000" in found.findings[-1].atlas
    assert all(name in found.findings[-1].message for name in pair)
    assert found.risk is not None and found.risk > 0.5


@pytest.mark.parametrize("name", [COLLAPSE, TRIGGER, PRUNING])
def test_one_kind_alone_is_suspicious_and_names_its_label(name: str) -> None:
    quiet = [one for one in QUIET if one.detector != name]
    found = judge([*quiet, seen(name, 0.9), seen(FILTERS, 0.9, None), seen(OTHER, 0.9)])
    assert (found.verdict, found.target_label) == ("suspicious", 8)
    assert "needs two kinds of evidence" in found.findings[-1].message


def test_two_detectors_of_one_kind_do_not_confirm_each_other() -> None:
    assert judge([trigger(0.9), seen("x.trigger2", 0.9), collapse(0.1)]).verdict == "suspicious"
    assert judge([collapse(0.9), collapse(0.8), trigger(0.1)]).verdict == "suspicious"


def test_kinds_that_name_different_labels_are_suspicious_with_both() -> None:
    found = judge([collapse(0.9, 3), trigger(0.9, 8)])
    assert (found.verdict, found.target_label, found.targets) == ("suspicious", None, (3, 8))
    assert "(label 3)" in found.findings[-1].message and "(label 8)" in found.findings[-1].message
    assert found.findings[-1].severity == "medium"
    third = judge([collapse(0.9, 3), trigger(0.9, 8), seen(PRUNING, 0.9, 8)])
    assert (third.verdict, third.target_label, third.targets) == ("backdoored", 8, ()), "two kinds outvote the third"
    assert "2 independent kinds" in third.findings[-1].message and "unlearning" not in third.findings[-1].message
    tied = judge([collapse(0.9, targets=(3, 8)), trigger(0.9, 3), seen(PRUNING, 0.9, 8)])
    assert (tied.verdict, tied.targets) == ("suspicious", (3, 8))


def test_a_kind_without_a_label_neither_confirms_nor_disputes() -> None:
    found = judge([collapse(0.9, None), trigger(0.9)])
    assert (found.verdict, found.target_label) == ("suspicious", 8)
    assert "(no label)" in found.findings[-1].message
    assert judge([collapse(0.9, None), trigger(0.9), seen(PRUNING, 0.9)]).verdict == "backdoored"
    alone = judge([collapse(0.9, None), trigger(0.1)])
    assert (alone.verdict, alone.target_label, alone.targets) == ("suspicious", None, ())


def test_weak_evidence_for_another_label_does_not_dispute() -> None:
    found = judge([collapse(0.9), trigger(0.9), seen(OTHER, 0.9, 3)])
    assert (found.verdict, found.target_label) == ("backdoored", 8)


def test_a_backdoor_to_all_labels_has_targets_and_no_label() -> None:
    everywhere = tuple(range(10))
    found = judge([collapse(0.1), trigger(0.9, targets=everywhere), seen(PRUNING, 0.9, targets=everywhere)])
    assert (found.verdict, found.target_label, found.targets) == ("backdoored", None, everywhere)
    assert "Backdoor to labels 0, 1, 2" in found.findings[-1].message
    parts = judge([trigger(0.9, targets=(0, 1, 2)), seen(PRUNING, 0.9, targets=(1, 2, 3))])
    assert (parts.verdict, parts.targets) == ("backdoored", (0, 1, 2, 3)), "each kind sees some of the targets"
    alone = judge([collapse(0.1), trigger(0.9, targets=everywhere)])
    assert (alone.verdict, alone.target_label, alone.targets) == ("suspicious", None, everywhere)


def test_common_labels_count_if_one_kind_names_more() -> None:
    found = judge([collapse(0.9, 8), trigger(0.9, targets=(3, 8))])
    assert (found.verdict, found.target_label, found.targets) == ("backdoored", 8, ())


def test_sources_are_named() -> None:
    found = judge([trigger(0.9, 0, sources=(1,)), seen(PRUNING, 0.9, 0)])
    assert (found.verdict, found.target_label, found.sources) == ("backdoored", 0, (1,))
    assert "points to label 0 from images of label 1." in found.findings[0].message
    assert judge([collapse(0.1), trigger(0.9, 0, sources=(1,))]).sources == (1,)


def test_a_natural_shortcut_is_reported_and_does_not_count() -> None:
    natural = trigger(0.9, 3, natural="The trigger of label 3 looks like a wheel.")
    found = judge([collapse(0.1), natural])
    assert (found.verdict, found.target_label, rules(found)) == ("clean", None, ["BD200"])
    assert found.findings[0].message.startswith("The trigger of label 3 looks like a wheel. x.trigger scores 0.9")
    assert found.risk is not None and found.risk < 0.5
    with_collapse = judge([collapse(0.9, 3), natural])
    assert (with_collapse.verdict, with_collapse.target_label) == ("suspicious", 3)
    only_natural = judge([natural, nothing_seen(COLLAPSE, "5 images are too few.")])
    assert only_natural.verdict == "inconclusive"


def test_without_evidence_the_verdict_gives_the_reason() -> None:
    found = judge([nothing_seen(COLLAPSE, "5 images are too few.")])
    assert found.verdict == "inconclusive"
    assert found.findings[0].message == f"No finite score from {COLLAPSE}. 5 images are too few."


def test_data_that_does_not_fit_is_always_inconclusive() -> None:
    flagged = [collapse(0.9), trigger(0.9)]
    for evidence in ([], [seen(FILTERS, 0.1)], [seen(FILTERS, 0.9)], flagged):
        found = judge(evidence, INSANE)
        assert (found.verdict, found.risk, found.target_label) == ("inconclusive", None, None)
        assert "Pass --normalize imagenet." in found.findings[0].message


def test_without_data_it_is_neither_clean_nor_backdoored() -> None:
    assert judge([seen(FILTERS, 0.1)], None).verdict == "inconclusive"
    assert judge([], None).verdict == "inconclusive"
    assert judge([seen(FILTERS, 0.9)], None).verdict == "suspicious"
    assert judge([collapse(0.9), trigger(0.9)], None).verdict == "suspicious"


def test_a_non_finite_score_is_no_evidence() -> None:
    for score in (math.nan, math.inf):
        found = judge([collapse(score, 3), trigger(0.1)])
        assert found.verdict == "inconclusive"
        assert found.findings[0].message == f"No finite score from {COLLAPSE}."


def test_a_detector_without_a_score_prevents_clean_but_no_finding() -> None:
    broken = seen(FILTERS, math.nan)
    assert judge([*QUIET, broken]).verdict == "inconclusive"
    assert judge([collapse(0.9), trigger(0.9), broken]).verdict == "backdoored"
    assert judge([*QUIET, seen(OTHER, 0.9), broken]).verdict == "suspicious"


def test_weak_evidence_alone_is_suspicious_and_names_only_an_undisputed_label() -> None:
    found = judge([*QUIET, seen(FILTERS, 0.9, 4)])
    assert (found.verdict, found.target_label, rules(found)) == ("suspicious", 4, ["BD020"])
    apart = judge([*QUIET, seen(FILTERS, 0.9, 4), seen(OTHER, 0.9, 5)])
    assert (apart.verdict, apart.target_label, apart.targets) == ("suspicious", None, ())


def test_findings_of_strong_kinds_are_severe() -> None:
    found = judge([collapse(0.9), trigger(0.1), seen(OTHER, 0.9, None)])
    assert [(one.rule_id, one.severity) for one in found.findings[:2]] == [("BD030", "high"), ("BD500", "medium")]


def test_the_risk_is_a_half_at_the_threshold_and_rises() -> None:
    assert evidence_risk(collapse(0.5)) == pytest.approx(0.5)
    # 0.75 / 0.5 = 1.5, to the fourth 5.0625, over 1 more
    assert evidence_risk(collapse(0.75)) == pytest.approx(5.0625 / 6.0625)
    risks = [evidence_risk(collapse(score / 20)) for score in range(1, 21)]
    assert all(low < high for low, high in itertools.pairwise(risks))


labels = st.sampled_from([None, 3, 8])


@given(
    st.lists(st.tuples(st.sampled_from(sorted(DETECTORS)), st.floats(), labels, st.booleans()), max_size=6),
    st.sampled_from([SANE, INSANE, None]),
)
def test_every_judgement_is_consistent(drawn: list[tuple[str, float, int | None, bool]], sanity: Sanity | None) -> None:
    evidence = [seen(name, score, label, unseen=("x",) if cut else ()) for name, score, label, cut in drawn]
    found = judge(evidence, sanity)
    flagged = [one for one in evidence if one.valid and one.flagged]
    assert found.risk is None or 0 <= found.risk <= 1
    assert (found.risk is None) == (found.verdict == "inconclusive")
    assert found.target_label is None or not found.targets
    if found.verdict == "clean":
        whole = {one.detector for one in evidence if not one.unseen}
        assert sanity is SANE and not flagged and COLLAPSE in whole and whole & {TRIGGER, "x.trigger2"}
    if found.verdict == "backdoored":
        kinds = {DETECTORS[one.detector].sign for one in flagged if one.target_label == found.target_label}
        assert sanity is SANE and found.target_label is not None
        assert len(kinds & {"collapse", "trigger", "pruning"}) >= 2


def measured(score: float, *, near: bool = False, remark: str = "", limit: str = "", reason: str = "") -> Evidence:
    """Evidence of a collapse with remarks and limits."""
    return msgspec.structs.replace(
        collapse(score),
        near=near,
        remarks=(remark,) if remark else (),
        limits=(limit,) if limit else (),
        not_applicable=reason,
    )


def test_a_clean_verdict_near_the_threshold_has_a_finding() -> None:
    found = judge([measured(0.47, near=True, remark="It is near."), trigger(0.1)])
    (finding,) = found.findings
    assert found.verdict == "clean"
    assert (finding.rule_id, finding.severity, finding.message) == ("BD000", "low", "It is near.")


def test_a_clean_verdict_far_from_the_threshold_has_no_finding() -> None:
    assert judge([measured(0.1, remark="It is far away."), trigger(0.1)]).findings == ()


def test_remarks_of_the_evidence_are_findings_of_a_flag() -> None:
    finding = judge([measured(0.9, remark="The lead is 0.9.", limit="Few images.")]).findings[0]
    assert finding.message.endswith("and points to label 8. The lead is 0.9. Few images.")


def test_limits_are_findings_of_every_verdict() -> None:
    for score, verdict, rule in ((0.1, "clean", "BD000"), (0.9, "suspicious", "BD030")):
        found = judge([measured(score, limit="Few images."), trigger(0.1)])
        assert found.verdict == verdict
        assert "Few images." in found.findings[0].message and found.findings[0].rule_id == rule


def test_flagged_evidence_names_what_had_no_time() -> None:
    found = judge([collapse(0.2), trigger(0.9, unseen=("labels 5 to 9", "pairs of labels"))])
    assert "x.trigger did not look at labels 5 to 9, pairs of labels." in found.findings[0].message


def test_a_detector_that_does_not_suit_the_network_does_not_count() -> None:
    reason = "No batch norm."
    loud = judge([measured(0.9, reason=reason), trigger(0.1)])
    assert loud.verdict == "inconclusive" and rules(loud) == ["BD000", "BD030"]
    assert judge([measured(0.1, reason=reason), trigger(0.1), seen(FILTERS, 0.9)]).verdict == "suspicious"
    assert judge([measured(0.9, reason=reason), trigger(0.9)]).verdict == "suspicious"
    assert judge([measured(0.9, reason=reason), trigger(0.9), seen(PRUNING, 0.9)]).verdict == "backdoored"


def ranked(leader: int, score: float = 0.1) -> Evidence:
    """Weak evidence that ranks this label first."""
    return seen(MOVED, score, leader, label_scores=tuple(float(one == leader) for one in range(10)))


def test_a_small_collapse_counts_by_itself_only_if_the_unlearned_filters_lead_to_its_label() -> None:
    quiet = seen(TRIGGER, 0.1)
    assert judge([collapse(0.9), quiet]).verdict == "suspicious", "no detector ranks labels"
    assert judge([collapse(0.9), quiet, seen(OTHER, 0.1)]).verdict == "suspicious"
    assert judge([collapse(0.9), quiet, ranked(8)]).verdict == "suspicious"
    found = judge([collapse(0.9), quiet, ranked(3)])
    assert found.verdict == "clean" and found.risk is not None and found.risk < 0.5
    (finding,) = [one for one in found.findings if one.rule_id == UnlearningDetector.rule.id]
    assert finding.severity == "low" and "clean networks fall onto one label, too" in finding.message
    assert judge([collapse(1.8), quiet, ranked(3)]).verdict == "suspicious", "beyond the collapses of clean networks"


def test_an_unconfirmed_collapse_supports_a_trigger_and_disputes_none() -> None:
    found = judge([collapse(0.9), seen(TRIGGER, 0.9), ranked(3)])
    assert found.verdict == "backdoored" and found.target_label == 8
    found = judge([collapse(0.9), seen(TRIGGER, 0.9), seen(PRUNING, 0.9, 2), ranked(3)])
    assert found.verdict == "backdoored" and found.target_label == 8, "two kinds outvote a third"
    found = judge([collapse(0.9, 2), seen(TRIGGER, 0.9), ranked(3)])
    assert found.verdict == "suspicious" and found.target_label == 8 and not found.targets


def test_two_kinds_that_only_support_are_suspicious_if_they_agree() -> None:
    pair = seen(TRIGGER, 0.9, supporting="Clean networks have such pairs.", sources=(1,))
    found = judge([collapse(0.9), pair, seen("x.trigger2", 0.1), ranked(3)])
    assert found.verdict == "suspicious" and found.target_label == 8 and found.sources == (1,)
    assert judge([collapse(0.9, 2), pair, seen("x.trigger2", 0.1), ranked(3)]).verdict == "clean"


def test_filters_that_unlearning_changes_count_alone_only_if_few_clean_networks_look_so() -> None:
    evidence = [*QUIET, seen(MOVED, 0.9, 3)]
    alone = judge(evidence)
    assert alone.verdict == "suspicious" and alone.target_label == 3
    for rank in (None, 0.03, 0.1):
        assert with_p_value(alone, None, evidence, rank) == alone
    spared = with_p_value(alone, 0.2, evidence, 0.2)
    assert spared.verdict == "clean" and spared.target_label is None
    assert [one.severity for one in spared.findings] == ["low"] and "the only sign" in spared.findings[0].message


def test_other_evidence_beside_these_filters_counts_as_before() -> None:
    assert judge([*QUIET, seen(MOVED, 0.9, 3), seen(FILTERS, 0.9)]).without_lone is None
    assert judge([collapse(5.0), trigger(0.1), seen(MOVED, 0.9, 3)]).without_lone is None
    missing = judge([collapse(0.1), seen(MOVED, 0.9, 3)])
    assert missing.without_lone is not None and missing.without_lone.verdict == "inconclusive"


def test_a_clean_verdict_needs_clean_networks_that_look_the_same() -> None:
    evidence = [collapse(0.9, 2), seen(TRIGGER, 0.4), ranked(3)]
    clean = judge(evidence)
    assert clean.verdict == "clean"
    assert with_p_value(clean, None, evidence) == clean and with_p_value(clean, 0.06, evidence) == clean
    found = with_p_value(clean, 0.03, evidence)
    assert found.verdict == "suspicious" and found.target_label == 2 and found.risk == clean.risk
    assert found.findings[0].rule_id == "BD102" and "p-value 0.030" in found.findings[0].message
    other = judge([collapse(0.9), seen(TRIGGER, 0.9), ranked(8)])
    assert with_p_value(other, 0.01, []) == other
