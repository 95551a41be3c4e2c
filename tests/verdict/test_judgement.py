"""The verdict: what the evidence allows, and never clean without the leading detector on good data."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdprune.analysis.sanity import Sanity
from bdprune.methods.base import Evidence
from bdprune.verdict.judgement import LEADER, evidence_risk, judge

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


def measured(
    score: float, near: bool, *, leads: int = 5, images: int = 500, classes: int = 10, norms: int = 20
) -> Evidence:
    """Evidence of the unlearning detector with what it tells of its runs."""
    details = {
        "leads": [score] * leads,
        "standard_error": 0.02 if leads > 1 else None,
        "near": near,
        "images": images,
        "flip_shares": [0.1] * classes,
        "batch_norms": norms,
    }
    return Evidence(LEADER, score, 0.5, score > 0.5, 8, details=details)


def test_clean_that_is_near_the_threshold_says_so() -> None:
    found = judge([measured(0.47, True)], SANE)
    (finding,) = found.findings
    assert found.verdict == "clean" and (finding.rule_id, finding.severity) == ("BD000", "low")
    assert finding.message == (
        "The lead is 0.470 +- 0.020 over 5 orders of 500 images, below the threshold of 0.500, but near it."
    )


def test_clean_that_is_far_from_the_threshold_needs_no_finding() -> None:
    assert judge([measured(0.1, False, leads=1)], SANE).findings == ()


def test_flag_says_how_near_the_lead_is() -> None:
    far = judge([measured(0.9, False, leads=1)], SANE).findings[0].message
    assert far.endswith("label 8. The lead is 0.900 over 1 order of 500 images, above the threshold of 0.500.")
    near = judge([measured(0.52, True)], SANE).findings[0].message
    assert near.endswith("0.520 +- 0.020 over 5 orders of 500 images, above the threshold of 0.500, but near it.")


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"images": 299}, "With fewer than 300 images"),
        ({"classes": 2}, "Of 2 classes a lead says little"),
    ],
)
def test_limits_of_the_lead_are_said_of_every_verdict(limit: dict[str, int], words: str) -> None:
    for score, verdict in ((0.1, "clean"), (0.9, "backdoored")):
        found = judge([measured(score, False, **limit)], SANE)
        assert found.verdict == verdict
        assert words in found.findings[0].message
    assert found.findings[0].rule_id == "BD030"


def test_a_network_without_batch_norm_is_neither_clean_nor_backdoored() -> None:
    quiet = judge([measured(0.1, False, norms=0), other(3.0)], SANE)
    assert quiet.verdict == "inconclusive" and "no batch norm" in quiet.findings[0].message
    loud = judge([measured(0.9, False, norms=0), other(3.0)], SANE)
    assert loud.verdict == "inconclusive" and [one.rule_id for one in loud.findings] == ["BD000", "BD030"]
    seen = judge([measured(0.1, False, norms=0), other(9.0)], SANE)
    assert seen.verdict == "suspicious"
    confirmed = judge([measured(0.9, False, norms=0), other(9.0)], SANE)
    assert confirmed.verdict == "backdoored"
