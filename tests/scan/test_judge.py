"""The verdict: what the evidence allows, and never clean without the leading detector on good data."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdprune.data.sanity import Sanity
from bdprune.detect.base import Evidence
from bdprune.scan.judge import LEADER, evidence_risk, judge

SANE = Sanity(0.93, True, "Clean accuracy is 93.0% on 500 images.")
INSANE = Sanity(0.12, False, "Clean accuracy is 12.0%.", "Pass --normalize imagenet.")


def unlearning(score: float, label: int | None = 8) -> Evidence:
    return Evidence(LEADER, score, 0.5, score > 0.5, label)


def other(score: float, label: int | None = None, name: str = "bdprune.lipschitz") -> Evidence:
    return Evidence(name, score, 6.0, score > 6, label)


def test_nothing_flagged_is_clean() -> None:
    found = judge([unlearning(0.2), other(3.0)], SANE)
    assert (found.verdict, found.target_label, found.findings) == ("clean", None, ())
    assert found.risk is not None and found.risk < 0.5


def test_leader_alone_makes_it_backdoored_and_names_the_label() -> None:
    found = judge([unlearning(0.9), other(3.0)], SANE)
    assert (found.verdict, found.target_label) == ("backdoored", 8)
    assert [one.rule_id for one in found.findings] == ["BD030"]
    assert found.risk is not None and found.risk > 0.5


def test_silence_says_why() -> None:
    silent = Evidence(LEADER, float("nan"), float("nan"), False, details={"error": "5 images are too few."})
    found = judge([silent], SANE)
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


def test_flag_without_the_leader_is_suspicious() -> None:
    found = judge([unlearning(0.2), other(9.0, 4)], SANE)
    assert (found.verdict, found.target_label) == ("suspicious", 4)


def test_data_that_does_not_fit_is_inconclusive_whatever_was_seen() -> None:
    for evidence in ([], [other(1.0)], [other(9.0)], [unlearning(0.9), other(9.0)]):
        found = judge(evidence, INSANE)
        assert (found.verdict, found.risk, found.target_label) == ("inconclusive", None, None)
        assert "Pass --normalize imagenet." in found.findings[0].message


def test_without_data_it_is_never_clean() -> None:
    assert judge([other(1.0)], None).verdict == "inconclusive"
    assert judge([], None).verdict == "inconclusive"
    assert judge([other(9.0)], None).verdict == "suspicious"


def test_score_that_is_not_finite_says_nothing() -> None:
    for score in (math.nan, math.inf):
        found = judge([Evidence(LEADER, score, 0.5, True, 3), other(1.0)], SANE)
        assert found.verdict == "inconclusive"
        assert found.findings[0].message == f"No finite score from {LEADER}."


def test_one_that_gives_no_number_spoils_clean_but_no_flag() -> None:
    broken = other(math.nan)
    assert judge([unlearning(0.2), broken], SANE).verdict == "inconclusive"
    assert judge([unlearning(0.9), broken], SANE).verdict == "backdoored"
    assert judge([unlearning(0.2), other(9.0), other(math.nan, name="x.third")], SANE).verdict == "suspicious"


def test_leader_that_names_no_label_is_suspicious() -> None:
    found = judge([unlearning(0.9, None), other(1.0)], SANE)
    assert (found.verdict, found.target_label) == ("suspicious", None)


def test_risk_is_a_half_at_the_threshold_and_rises() -> None:
    assert evidence_risk(unlearning(0.5)) == pytest.approx(0.5)
    # 0.75 / 0.5 = 1.5, to the fourth 5.0625, over 1 more
    assert evidence_risk(unlearning(0.75)) == pytest.approx(5.0625 / 6.0625)
    risks = [evidence_risk(unlearning(score / 20)) for score in range(1, 21)]
    assert all(low < high for low, high in itertools.pairwise(risks))


@given(st.floats(), st.floats(), st.booleans(), st.booleans())
def test_every_judgement_is_sound(leading: float, second: float, sane: bool, with_data: bool) -> None:
    sanity = (SANE if sane else INSANE) if with_data else None
    found = judge([unlearning(leading), other(second)], sanity)
    assert found.risk is None or 0 <= found.risk <= 1
    assert (found.risk is None) == (found.verdict == "inconclusive")
    if found.verdict == "clean":
        assert sanity is SANE and not leading > 0.5 and not second > 6
    if found.verdict == "backdoored":
        assert found.target_label == 8 and leading > 0.5
