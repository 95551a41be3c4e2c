"""Words and numbers that all reports share."""

from __future__ import annotations

import msgspec
import pytest

from bdprune.record import Attempt, CalibrationInfo, Evidence, PurifyResult, Result, TriggerInfo, WeightCoverage
from bdprune.report import summary


def test_headlines_name_the_label_if_there_is_one(backdoored: Result, clean: Result, failed: Result) -> None:
    assert summary.headline(backdoored).endswith("leads to label 8 (ship).")
    suspicious = msgspec.structs.replace(backdoored, verdict="suspicious", data=None)
    assert summary.headline(suspicious).endswith("leads to label 8, but not enough to be sure.")
    assert summary.headline(clean) == "No sign of a backdoor was found."
    unnamed = msgspec.structs.replace(backdoored, target_label=None)
    assert summary.headline(unnamed) == "This network carries a backdoor."
    assert summary.headline(failed) == "The archive is cut off."


def test_labels_are_named_as_far_as_names_are_known() -> None:
    names = ("airplane", "")
    assert [summary.named(label, names) for label in (0, 1, 2, -1)] == ["0 (airplane)", "1", "2", "-1"]
    assert summary.labels((), names) == "" and summary.labels((0,), names) == "label 0 (airplane)"
    assert summary.labels(range(1000), ()) == "labels 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 990 more"


def test_a_trigger_is_described_without_class_names(patch: TriggerInfo) -> None:
    only = msgspec.structs.replace(patch, source_labels=(3,))
    assert summary.trigger(only) == (
        "patch, label 8 for images of label 3, 3x3 pixels at (28, 28), flips 97 % of 250 held-out images"
    )


def test_the_advice_for_an_error_is_its_hint(failed: Result, backdoored: Result) -> None:
    assert summary.advice(failed) == "Download it again. Treat it as unscanned."
    assert "bdprune purify" in summary.advice(backdoored)


def test_a_clean_verdict_is_never_called_proof(clean: Result) -> None:
    assert "does not prove" in summary.advice(clean)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.42, "0.42 s"),
        (12.34, "12.3 s"),
        (59.99, "60.0 s"),
        (245.0, "4 min 05 s"),
        (3600.0, "60 min 00 s"),
    ],
)
def test_seconds(value: float | None, text: str) -> None:
    assert summary.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000_000_000, "2500.0 GB")]
)
def test_size(value: int | None, text: str) -> None:
    assert summary.size(value) == text


def test_numbers_and_shares() -> None:
    assert (summary.number(None), summary.number(0.123456), summary.number(4e-9)) == ("–", "0.1235", "4e-09")
    assert (summary.percent(None), summary.percent(0.9345), summary.percent(1.0, 0)) == ("–", "93.5 %", "100 %")


def test_tally(backdoored: Result, clean: Result) -> None:
    assert summary.tally([clean]) == "1 model: 1 clean"
    assert summary.tally([clean, backdoored, clean]) == "3 models: 1 backdoored, 2 clean"
    assert summary.tally([]) == "0 models: nothing scanned"


@pytest.mark.parametrize(
    ("changed", "outcome", "words"),
    [
        ("nothing", "unchanged", "did not change the weights"),
        ("pruned", "repaired", "pruned 41 of 2400 filters in 2 filter groups"),
        ("retrained", "repaired", "retrained the weights"),
        ("pruned and retrained", "repaired", "pruned 41 of 2400 filters in 2 filter groups and retrained the weights"),
    ],
)
def test_a_repair_is_described_by_its_changes(repaired: PurifyResult, changed: str, outcome: str, words: str) -> None:
    result = msgspec.structs.replace(repaired, change=changed)
    assert (summary.outcome(result), summary.change(result)) == (outcome, words)
    partly = msgspec.structs.replace(result, left=("ema: not chosen",))
    assert summary.outcome(partly) == ("unchanged" if changed == "nothing" else "partly repaired")
    unchecked = msgspec.structs.replace(result, outcome="unchecked")
    assert summary.outcome(unchecked) == ("unchanged" if changed == "nothing" else "changed, not checked")
    both = msgspec.structs.replace(partly, outcome="unchecked")
    assert summary.outcome(both) == ("unchanged" if changed == "nothing" else "partly changed, not checked")


def test_a_method_that_nothing_could_check_is_not_called_good(repaired: PurifyResult) -> None:
    tried = (Attempt(method="ibau", accuracy_after=0.9, chosen=True, seconds=2.0),)
    unverified = msgspec.structs.replace(repaired, attempts=tried, outcome="unverified")
    assert summary.attempt_rows(unverified)[0][1].startswith(
        "not checked, because no sign of a backdoor was found before"
    )
    checked = msgspec.structs.replace(unverified, outcome="repaired")
    assert summary.attempt_rows(checked)[0][1].startswith("no sign of the backdoor is left")


def test_advice_after_a_repair(repaired: PurifyResult) -> None:
    assert summary.repair_advice(repaired).startswith("Scan the repaired file")
    assert summary.repair_advice(msgspec.structs.replace(repaired, output=None)).startswith("Scan the repaired model")
    unchanged = msgspec.structs.replace(repaired, change="nothing", selection="no threshold keeps the accuracy")
    assert summary.repair_advice(unchanged) == "It is not safer than before: no threshold keeps the accuracy."
    assert summary.phases(msgspec.structs.replace(repaired, phases={"fine_tune": 61.0, "sweep": None})) == [
        "fine tune 1 min 01 s",
        "sweep –",
    ]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "not flagged"),
        ({"flagged": True}, "flagged"),
        ({"near": True}, "not flagged, near"),
        ({"score": None}, "no score"),
        ({"score": None, "error": "The loss is not finite."}, "failed"),
    ],
)
def test_a_detector_is_described_in_words(fields: dict[str, object], words: str) -> None:
    one = Evidence(detector="x.y", score=0.5, threshold=1.0, flagged=False)
    assert summary.says(msgspec.structs.replace(one, **fields)) == words


def test_notes_contain_all_texts_of_a_detector() -> None:
    one = Evidence(detector="x.y", score=0.5, threshold=1.0, flagged=False)
    assert summary.notes(one) == []
    said = msgspec.structs.replace(one, error="E.", not_applicable="N.", remarks=("R1.", "R2."), limits=("L.",))
    assert summary.notes(said) == [
        ("error", "E."),
        ("not applicable", "N."),
        ("remark", "R1."),
        ("remark", "R2."),
        ("limit", "L."),
    ]


def test_other_weights_of_a_file_are_listed() -> None:
    assert summary.other_weights(None) == []
    found = WeightCoverage(scanned=1, unscanned=("head",), left_out=("ema",), same=("copy",))
    assert dict(summary.other_weights(found)) == {
        "same weights": ("copy",),
        "kept, without weights": (),
        "not scanned": ("head", "ema"),
    }


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (None, ""),
        (CalibrationInfo(table="t", prior=0.4, reservation="Not calibrated."), "Not calibrated."),
        (
            CalibrationInfo(table="t", prior=0.4),
            "a probability by the table t, if 40.0 % of such models are backdoored",
        ),
        (
            CalibrationInfo(table="t", prior=0.4, p_value=0.05, references=39),
            "a probability by the table t, if 40.0 % of such models are backdoored; p-value 0.05 from 39 clean "
            "networks",
        ),
    ],
)
def test_a_risk_says_how_far_it_is_a_probability(info: CalibrationInfo | None, words: str) -> None:
    assert summary.calibration(info) == words
