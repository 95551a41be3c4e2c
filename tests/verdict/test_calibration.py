"""Calibrated probabilities from the scores of detectors."""

from __future__ import annotations

import math

import pytest

from bdprune.record import Evidence
from bdprune.verdict.calibration import Calibration, Input, Reference, conformal_p, strengths_of

TABLE = Calibration(
    name="tiny",
    budget="default",
    inputs=(
        Input(detector="x.one", centre=-1.0, scale=0.5, weight=1.0),
        Input(detector="x.two", centre=0.0, scale=1.0, weight=2.0),
    ),
    agreement=3.0,
    bias=-1.0,
    clean=(Reference(arch="known", log_odds=tuple(range(19))), Reference(arch="rare", log_odds=(0.0,))),
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


def test_an_estimate_says_how_many_references_it_has() -> None:
    known, rare, other = (TABLE.estimate([seen("x.two", 0.5)], False, arch) for arch in ("known", "rare", "other"))
    assert known.probability == rare.probability == other.probability == pytest.approx(1 / (1 + math.e))
    assert known.p_value == 1.0 and known.note == "" and known.references == 19
    assert rare.p_value is None and "only 1 clean" in rare.note
    assert other.p_value is None and "not calibrated" in other.note


def test_the_p_value_counts_clean_networks_that_look_worse() -> None:
    assert conformal_p(100.0, range(19)) == pytest.approx(0.05)
    assert conformal_p(18.0, range(19)) == pytest.approx(0.1)


def test_a_table_survives_json() -> None:
    assert Calibration.from_json(TABLE.to_json()) == TABLE
