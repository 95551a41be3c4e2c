"""The rows of a table of many models."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from bdprune.record import ArtifactInfo, Evidence, Finding, Result
from bdprune.report.rows import LONGEST, row_of, rules_of, scores_of

FILE = "models/badnets.pth"


def changed(result: Result, **fields: Any) -> Result:
    return msgspec.structs.replace(result, **fields)


def test_the_row_of_a_backdoored_model(triggered: Result) -> None:
    row = row_of(triggered, FILE, "scans.db")
    assert (row.verdict, row.name, row.store, row.risk) == ("backdoored", FILE, "scans.db", 0.994)
    assert (row.label, row.arch, row.started, row.seconds) == ("label 8 (ship)", "resnet18_cifar", "2026-11-20", 12.5)
    assert row.why == "Backdoor to label 8: 2 detectors see it independently." and row.rules == "BD101"
    assert row.scores == "unlearning 0.981 > 0.6, lipschitz 9.4 > 5, inversion 0.97 > 0.5"
    assert row.trigger == "patch, 3x3 pixels at (28, 28), flips 97 % of 250 held-out images"


def test_a_clean_model_has_the_detector_nearest_to_its_threshold(clean: Result) -> None:
    row = row_of(clean, "models/clean.pth", "scans.db")
    assert row.why == row.scores == "lipschitz 3.35 of 5" and (row.label, row.trigger) == ("–", "")


def test_an_error_and_its_type(failed: Result) -> None:
    assert failed.error is not None
    row = row_of(failed, "models/broken.pth", "scans.db")
    assert (row.why, row.rules, row.risk) == (failed.error.message, failed.error.type, None)


def test_the_most_serious_finding_is_the_reason(backdoored: Result) -> None:
    found = [
        Finding(rule_id="BD030", severity="medium", message="medium"),
        Finding(rule_id="BD101", severity="critical", message="critical"),
        Finding(rule_id="BD030", severity="low", message="low"),
    ]
    result = changed(backdoored, findings=tuple(found))
    assert row_of(result, FILE, "s").why == "critical" and rules_of(result) == ["BD030", "BD101"]


def test_scores_without_a_threshold_that_a_share_needs(clean: Result) -> None:
    odd = [
        Evidence(detector="a.b", score=-1.0, threshold=0.0, flagged=False),
        Evidence(detector="bdprune.c", score=None, threshold=None, flagged=False, error="x"),
    ]
    assert scores_of(changed(clean, detectors=tuple(odd))) == "a.b -1 of 0"
    assert scores_of(changed(clean, detectors=())) == ""


def test_several_labels_and_several_sets_of_weights(backdoored: Result) -> None:
    artifact = ArtifactInfo(path=FILE, state_key="ema", sets=("ema", "net"))
    row = row_of(changed(backdoored, target_label=None, targets=(3, 5), artifact=artifact), FILE, "s")
    assert (row.label, row.file, row.weights, row.name) == ("labels 3 (cat), 5 (dog)", FILE, "ema", f"{FILE}#ema")


def test_hostile_texts_are_bounded_and_visible(backdoored: Result) -> None:
    long = "a" * 500_000
    artifact = ArtifactInfo(path=f"{long}/end", state_key=long, sets=(long, "net"))
    assert backdoored.model is not None and backdoored.data is not None
    result = changed(
        backdoored,
        artifact=artifact,
        model=changed(backdoored.model, arch="\u202e" + long),  # type: ignore[arg-type]
        data=changed(backdoored.data, class_names=(long,) * 10),  # type: ignore[arg-type]
        findings=(Finding(rule_id="BD101", severity="high", message="\x1b[2J" + long),),
        detectors=(Evidence(detector=long, score=2.0, threshold=1.0, flagged=True),),
        started="\u2028</script>",
    )
    row = row_of(result, artifact.path, long)
    assert len(row.file) == LONGEST + 1 and row.file.endswith("/end") and "…" in row.file
    assert sum(len(str(value)) for value in row) < 4 * LONGEST + 1200
    assert row.started == "–" and row.arch.startswith("�aa") and row.why.startswith("�[2Jaa")


@pytest.mark.parametrize("verdict", ["backdoored", "suspicious", "error", "inconclusive", "clean"])
def test_rows_rank_by_verdict_then_risk(backdoored: Result, verdict: Any) -> None:
    row = row_of(changed(backdoored, verdict=verdict), FILE, "s")
    assert row.rank > row_of(changed(backdoored, risk=0.999), FILE, "s").rank
    assert row.rank < row_of(changed(backdoored, verdict=verdict, risk=0.1), FILE, "s").rank
