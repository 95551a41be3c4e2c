"""Calibrated probabilities from the scores of detectors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest

from bdprune.errors import OptionError
from bdprune.record import Evidence
from bdprune.verdict.calibration import (
    LARGEST_TABLE,
    Calibration,
    Input,
    References,
    conformal_p,
    read_table,
    strengths_of,
)

TABLE = Calibration(
    name="tiny",
    budget="default",
    inputs=(
        Input(detector="x.one", centre=-1.0, scale=0.5, weight=1.0),
        Input(detector="x.two", centre=0.0, scale=1.0, weight=2.0),
    ),
    agreement=3.0,
    bias=-1.0,
    clean=(References(arch="known", log_odds=tuple(range(19))), References(arch="rare", log_odds=(0.0,))),
    networks=30,
    backdoored=10,
)


def seen(name: str, score: float | None, **more: str) -> Evidence:
    return Evidence(detector=name, score=score, threshold=0.5, flagged=(score or 0.0) > 0.5, **more)  # type: ignore[arg-type]


def test_strengths_are_limited_logarithms() -> None:
    found = strengths_of(
        [seen("a", 0.5), seen("b", 0.0), seen("c", 1e9), seen("d", None), seen("e", 1.0, not_applicable="x")]
    )
    assert found == {"a": 0.0, "b": -3.0, "c": 2.0}


def test_a_missing_detector_counts_as_average() -> None:
    assert TABLE.log_odds({}, False) == -1.0
    assert TABLE.log_odds({"x.one": 0.0, "x.other": 9.0}, False) == pytest.approx(-1 + 2)
    assert TABLE.log_odds({"x.two": 1.0}, True) == pytest.approx(-1 + 2 + 3)


def test_the_strength_of_a_natural_trigger_is_limited() -> None:
    assert strengths_of([seen("a", 1.0, natural="It looks like a feature."), seen("b", 0.25, natural="x")]) == {
        "a": 0.0,
        "b": pytest.approx(math.log(0.5)),
    }


def test_an_estimate_says_how_far_it_is_calibrated() -> None:
    every = [seen("x.one", 0.5), seen("x.two", 0.5)]
    known, rare, other = (TABLE.estimate(every, False, arch) for arch in ("known", "rare", "other"))
    assert known.p_value == pytest.approx(19 / 20) and known.reservation == "" and known.references == 19
    assert rare.p_value == pytest.approx(19 / 21) and rare.references == 20, "too few of its own: all count"
    assert other.p_value is None and "no reference for other" in other.reservation
    assert known.prior == pytest.approx(1 / 3) and known.table == "tiny"


def test_missing_detectors_are_named_unless_the_verdict_was_sure_before() -> None:
    found = TABLE.estimate([seen("x.two", 0.5)], False, "known")
    assert found.p_value is None and found.reservation.endswith("needs x.one to the end.")
    assert TABLE.estimate([seen("x.two", 0.5)], True, "known").reservation == ""


def test_a_search_that_did_not_end_and_another_budget_are_reservations() -> None:
    every = [seen("x.one", 0.5), Evidence(detector="x.two", score=1.0, threshold=0.5, flagged=True, unseen=("labels",))]
    assert "needs x.two to the end" in TABLE.estimate(every, True, "known").reservation
    found = TABLE.estimate([seen("x.one", 0.5), seen("x.two", 0.5)], False, "known", "full")
    assert "is for the budget default" in found.reservation and found.p_value is None


def test_a_detector_that_does_not_work_on_the_network_is_not_missed() -> None:
    found = TABLE.estimate([seen("x.one", 0.5), seen("x.two", 0.5)], False, "known", all_labels=False)
    assert found.reservation.endswith("some labels have no clean image.") and found.p_value is None
    found = TABLE.estimate([seen("x.one", 0.5, not_applicable="No norm."), seen("x.two", 0.5)], False, "known")
    assert found.reservation == "" and found.p_value is not None


def test_the_probability_is_that_of_the_log_odds() -> None:
    assert TABLE.probability([seen("x.two", 0.5)], False) == pytest.approx(1 / (1 + math.e))


def test_the_p_value_counts_clean_networks_that_look_worse() -> None:
    assert conformal_p(100.0, range(19)) == pytest.approx(0.05)
    assert conformal_p(18.0, range(19)) == pytest.approx(0.1)


def test_a_table_survives_json() -> None:
    assert Calibration.from_json(TABLE.to_json()) == TABLE


def test_a_written_table_is_read(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(TABLE.to_json())
    assert read_table(path) == TABLE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "x"}, "is no table"),
        ({"name": None}, "is no table"),
        ({"backdoored": 0}, "both kinds"),
        ({"agreement": -1.0}, "that no fit gives"),
        ({"bias": 1e300}, "that no fit gives"),
        ({"inputs": [{"detector": "a", "centre": 0.0, "scale": 0.0, "weight": 1.0}]}, "that no fit gives"),
        ({"inputs": [{"detector": "a", "centre": 0.0, "scale": 1.0, "weight": -1.0}]}, "that no fit gives"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(json.loads(TABLE.to_json()) | change))
    with pytest.raises(OptionError, match=message):
        read_table(path)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="Cannot read the table"):
        read_table(tmp_path / "missing.json")
    large = tmp_path / "large.json"
    large.write_bytes(b" " * (LARGEST_TABLE + 1))
    with pytest.raises(OptionError, match="too large"):
        read_table(large)


def test_a_rank_among_all_clean_networks_needs_the_same_kind_of_scan() -> None:
    every = [seen("x.one", 0.5), seen("x.two", 0.5)]
    assert TABLE.rank(every, "x.one", "default", True) == pytest.approx(19 / 21)
    for detector, budget, all_labels, evidence in (
        ("x.other", "default", True, every),
        ("x.one", "full", True, every),
        ("x.one", "default", False, every),
        ("x.one", "default", True, every[:1]),
    ):
        assert TABLE.rank(evidence, detector, budget, all_labels) is None  # type: ignore[arg-type]
    few = msgspec.structs.replace(TABLE, clean=TABLE.clean[1:])
    assert few.rank(every, "x.one", "default", True) is None
