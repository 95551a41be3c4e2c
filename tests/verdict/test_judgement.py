"""Verdicts from evidence; never clean without a decisive detector on good data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdprune.analysis import Case, Sanity
from bdprune.detectors.lipschitz import LipschitzDetector
from bdprune.detectors.unlearning import UnlearningDetector
from bdprune.methods import Detector
from bdprune.record import Evidence, Rule, nothing_seen
from bdprune.verdict.judgement import Judgement, evidence_risk
from bdprune.verdict.judgement import judge as judge_by

SANE = Sanity(0.93, True, "Clean accuracy is 93.0 % on 500 images.")
INSANE = Sanity(0.12, False, "Clean accuracy is 12.0 %.", "Pass --normalize imagenet.")
LEADER = UnlearningDetector.id


@dataclass(frozen=True)
class Third(Detector):
    """A detector of another package, which corroborates."""

    id = "x.third"
    title = "a third opinion"
    rule = Rule(id="BD500", name="third", help="A third opinion.")

    def __call__(self, case: Case) -> Evidence:
        raise NotImplementedError


@dataclass(frozen=True)
class Second(Third):
    """A decisive detector, like the leading one."""

    id = "x.second"
    decisive = True


DETECTORS: dict[str, Detector] = {one.id: one for one in (UnlearningDetector(), LipschitzDetector(), Third(), Second())}


def judge(evidence: Sequence[Evidence], sanity: Sanity | None) -> Judgement:
    """The verdict where exactly the detectors with evidence ran."""
    return judge_by([DETECTORS[one.detector] for one in evidence], evidence, sanity)


def unlearning(score: float, label: int | None = 8, name: str = LEADER) -> Evidence:
    return Evidence(detector=name, score=score, threshold=0.5, flagged=score > 0.5, target_label=label)


def other(score: float, label: int | None = None, name: str = LipschitzDetector.id) -> Evidence:
    return Evidence(detector=name, score=score, threshold=6.0, flagged=score > 6, target_label=label)


def test_nothing_flagged_is_clean() -> None:
    found = judge([unlearning(0.2), other(3.0)], SANE)
    assert (found.verdict, found.target_label, found.findings) == ("clean", None, ())
    assert found.risk is not None and found.risk < 0.5


def test_the_leading_detector_alone_makes_it_backdoored_and_names_the_label() -> None:
    found = judge([unlearning(0.9), other(3.0)], SANE)
    assert (found.verdict, found.target_label) == ("backdoored", 8)
    assert [one.rule_id for one in found.findings] == ["BD030"]
    assert found.risk is not None and found.risk > 0.5


def test_without_evidence_the_verdict_gives_the_reason() -> None:
    found = judge([nothing_seen(LEADER, "5 images are too few.")], SANE)
    assert found.verdict == "inconclusive"
    assert found.findings[0].message == f"No finite score from {LEADER}. 5 images are too few."


def test_one_detector_with_two_settings_does_not_confirm_itself() -> None:
    found = judge([unlearning(0.9), unlearning(0.8)], SANE)
    assert "BD101" not in [one.rule_id for one in found.findings]


def test_two_detectors_confirm_each_other() -> None:
    found = judge([unlearning(0.9), other(9.0)], SANE)
    assert found.verdict == "backdoored"
    assert [one.rule_id for one in found.findings] == ["BD030", "BD020", "BD101"]
    assert "AML.T0018.000" in found.findings[-1].atlas


def test_another_label_makes_it_suspicious() -> None:
    found = judge([unlearning(0.9, 3), other(9.0, 8)], SANE)
    assert (found.verdict, found.target_label) == ("suspicious", 3)
    assert "says 3, others say 8" in found.findings[-1].message


def test_a_flag_without_the_leading_detector_is_suspicious() -> None:
    found = judge([unlearning(0.2), other(9.0, 4)], SANE)
    assert (found.verdict, found.target_label) == ("suspicious", 4)


def test_data_that_does_not_fit_is_always_inconclusive() -> None:
    for evidence in ([], [other(1.0)], [other(9.0)], [unlearning(0.9), other(9.0)]):
        found = judge(evidence, INSANE)
        assert (found.verdict, found.risk, found.target_label) == ("inconclusive", None, None)
        assert "Pass --normalize imagenet." in found.findings[0].message


def test_without_data_it_is_never_clean() -> None:
    assert judge([other(1.0)], None).verdict == "inconclusive"
    assert judge([], None).verdict == "inconclusive"
    assert judge([other(9.0)], None).verdict == "suspicious"


def test_a_non_finite_score_is_no_evidence() -> None:
    for score in (math.nan, math.inf):
        found = judge([unlearning(score, 3), other(1.0)], SANE)
        assert found.verdict == "inconclusive"
        assert found.findings[0].message == f"No finite score from {LEADER}."


def test_a_detector_without_a_score_prevents_clean_but_no_flag() -> None:
    broken = other(math.nan)
    assert judge([unlearning(0.2), broken], SANE).verdict == "inconclusive"
    assert judge([unlearning(0.9), broken], SANE).verdict == "backdoored"
    assert judge([unlearning(0.2), other(9.0), other(math.nan, name="x.third")], SANE).verdict == "suspicious"


def test_a_leading_detector_without_a_label_is_suspicious() -> None:
    found = judge([unlearning(0.9, None), other(1.0)], SANE)
    assert (found.verdict, found.target_label) == ("suspicious", None)


def test_the_risk_is_a_half_at_the_threshold_and_rises() -> None:
    assert evidence_risk(unlearning(0.5)) == pytest.approx(0.5)
    # 0.75 / 0.5 = 1.5, to the fourth 5.0625, over 1 more
    assert evidence_risk(unlearning(0.75)) == pytest.approx(5.0625 / 6.0625)
    risks = [evidence_risk(unlearning(score / 20)) for score in range(1, 21)]
    assert all(low < high for low, high in itertools.pairwise(risks))


@given(st.floats(), st.floats(), st.booleans(), st.booleans())
def test_every_judgement_is_consistent(leading: float, second: float, sane: bool, with_data: bool) -> None:
    sanity = (SANE if sane else INSANE) if with_data else None
    found = judge([unlearning(leading), other(second)], sanity)
    assert found.risk is None or 0 <= found.risk <= 1
    assert (found.risk is None) == (found.verdict == "inconclusive")
    if found.verdict == "clean":
        assert sanity is SANE and not leading > 0.5 and not second > 6
    if found.verdict == "backdoored":
        assert found.target_label == 8 and leading > 0.5


def measured(score: float, *, near: bool = False, remark: str = "", limit: str = "", reason: str = "") -> Evidence:
    """Evidence of the leader with remarks and limits."""
    return msgspec.structs.replace(
        unlearning(score),
        near=near,
        remarks=(remark,) if remark else (),
        limits=(limit,) if limit else (),
        not_applicable=reason,
    )


def test_a_clean_verdict_near_the_threshold_has_a_finding() -> None:
    found = judge([measured(0.47, near=True, remark="It is near.")], SANE)
    (finding,) = found.findings
    assert found.verdict == "clean"
    assert (finding.rule_id, finding.severity, finding.message) == ("BD000", "low", "It is near.")


def test_a_clean_verdict_far_from_the_threshold_has_no_finding() -> None:
    assert judge([measured(0.1, remark="It is far away.")], SANE).findings == ()


def test_remarks_of_the_evidence_are_findings_of_a_flag() -> None:
    (finding,) = judge([measured(0.9, remark="The lead is 0.9.", limit="Few images.")], SANE).findings
    assert finding.message.endswith("and points to label 8. The lead is 0.9. Few images.")


def test_limits_are_findings_of_every_verdict() -> None:
    for score, verdict, rule in ((0.1, "clean", "BD000"), (0.9, "backdoored", "BD030")):
        found = judge([measured(score, limit="Few images.")], SANE)
        assert found.verdict == verdict
        assert "Few images." in found.findings[0].message and found.findings[0].rule_id == rule


def test_a_network_without_decisive_evidence_is_neither_clean_nor_backdoored() -> None:
    reason = "No batch norm."
    quiet = judge([measured(0.1, reason=reason), other(3.0)], SANE)
    assert quiet.verdict == "inconclusive" and quiet.findings[0].message == reason
    loud = judge([measured(0.9, reason=reason), other(3.0)], SANE)
    assert loud.verdict == "inconclusive" and [one.rule_id for one in loud.findings] == ["BD000", "BD030"]
    seen = judge([measured(0.1, reason=reason), other(9.0)], SANE)
    assert seen.verdict == "suspicious"
    confirmed = judge([measured(0.9, reason=reason), other(9.0)], SANE)
    assert confirmed.verdict == "backdoored"
    second = judge([measured(0.1, reason=reason), unlearning(0.2, name="x.second")], SANE)
    assert second.verdict == "clean", "another decisive detector suffices"


def test_any_decisive_detector_gives_the_verdict_and_its_rule() -> None:
    found = judge([unlearning(0.9, 4, "x.second"), other(3.0)], SANE)
    assert (found.verdict, found.target_label) == ("backdoored", 4)
    assert [(one.rule_id, one.severity) for one in found.findings] == [("BD500", "high")]
    assert judge([unlearning(0.2, name="x.second")], SANE).verdict == "clean"
    weak = judge([other(9.0, 4, "x.third")], SANE)
    assert weak.verdict == "suspicious" and [(one.rule_id, one.severity) for one in weak.findings] == [
        ("BD500", "medium")
    ]


def test_two_decisive_detectors_must_agree_on_the_label() -> None:
    one = unlearning(0.9, 4)
    assert judge([one, unlearning(0.9, 4, "x.second")], SANE).verdict == "backdoored"
    apart = judge([one, unlearning(0.9, 5, "x.second")], SANE)
    assert (apart.verdict, apart.target_label) == ("suspicious", None)
    silent = judge([one, unlearning(0.1, None, "x.second")], SANE)
    assert (silent.verdict, silent.target_label) == ("backdoored", 4)


def test_a_scan_without_detectors_has_a_finding() -> None:
    assert "(ran: none)" in judge([], SANE).findings[0].message
    assert LipschitzDetector.id in judge([other(1.0)], SANE).findings[0].message
