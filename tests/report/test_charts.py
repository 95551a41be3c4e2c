"""Charts of results, selected by the shape of the data."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from bdprune.record import Evidence, PurifyResult, Result, ScoreResult
from bdprune.report import charts

STEPS = [{"accuracy": 0.9, "votes": [1, 3], "loss": 2.0}, {"accuracy": None, "votes": [0, 0]}]
LAYERS = [{"layer": "conv1", "max_z": 2.0, "filter": 7}, {"layer": "conv2", "max_z": None}]


def evidence(**fields: Any) -> Evidence:
    return Evidence(detector="x.y", score=2.0, threshold=1.0, flagged=True, **fields)


def captions(one: Evidence) -> list[str]:
    return [caption for caption, _ in charts.detector_charts(one, ())]


def test_details_of_detectors_are_drawn(backdoored: Result) -> None:
    unlearning, lipschitz = backdoored.detectors
    assert captions(unlearning) == ["Score of each label", "Accuracy and votes, step by step"]
    assert captions(lipschitz) == ["Largest outlier in each layer"]
    assert charts.listed_details(unlearning) == {"lr": 0.01, "stopped": True}, "label scores are not listed again"


@pytest.mark.parametrize("name", ["trajectory", "anything"])
def test_details_are_drawn_by_shape_under_any_name(name: str) -> None:
    assert captions(evidence(details={name: STEPS})) == ["Accuracy and votes, step by step"]
    assert captions(evidence(details={name: LAYERS})) == ["Largest outlier in each layer"]
    assert charts.listed_details(evidence(details={name: LAYERS, "other": 3})) == {"other": 3}


@pytest.mark.parametrize("odd", ["up and down", [], [1, None], [{"name": "x"}], [*STEPS, *LAYERS], {"layer": "a"}])
def test_details_of_another_shape_are_listed(odd: object) -> None:
    one = evidence(details={"trajectory": odd})
    assert captions(one) == [] and charts.listed_details(one) == {"trajectory": odd}


def test_bars_of_labels_name_classes_and_mark_the_largest() -> None:
    ((_, chart),) = charts.detector_charts(evidence(label_scores=(0.25, None, 7.5)), ("cat", "dog"))
    assert "label 0 (cat): 0.25<" in chart and "label 1 (dog): –<" in chart and "label 2: 7.5<" in chart
    assert chart.count("bar marked") == 1
    assert captions(evidence(label_scores=(None, None))) == captions(evidence()) == []


def test_votes_of_the_named_label_have_their_own_line() -> None:
    ((_, chart),) = charts.detector_charts(evidence(details={"t": STEPS}, target_label=1), ())
    assert "votes for label 1" in chart and "unlearn" not in chart.lower()
    ((_, chart),) = charts.detector_charts(evidence(details={"t": STEPS}, target_label=2), ())
    assert "votes for label 2" not in chart, "no vote was counted for it"


def test_a_repair_shows_its_available_charts(repaired: PurifyResult, retrained: PurifyResult) -> None:
    assert [caption for caption, _ in charts.repair_charts(repaired)] == [
        "Clean accuracy against threshold",
        "Histogram of the masks or scores",
        "Pruned filters by layer",
    ]
    assert charts.repair_charts(retrained) == []
    unknown = tuple(msgspec.structs.replace(point, clean_accuracy=None) for point in repaired.curve)
    assert len(charts.repair_charts(msgspec.structs.replace(repaired, curve=unknown))) == 2


def test_scores_have_a_bar_for_each_layer(scored: ScoreResult) -> None:
    assert charts.score_chart(scored.layers).count("<rect") == len(scored.layers)
