from dataclasses import replace
from typing import Any

import pytest
import torch

from bdprune.detect.unlearning import UnlearningDetector
from bdprune.errors import DataError
from bdprune.training.precision import Plan
from bdprune.training.trajectory import UnlearnStep
from bdprune.training.unlearn import Unlearned, UnlearnSettings

SETTINGS = UnlearnSettings(lr=0.05, weight_decay=0, batch_size=30, padding=0, max_epochs=40)


def unlearned(model: Any, *wrong: tuple[int, int, int]) -> Unlearned:
    steps = tuple(UnlearnStep(2.0, 0.1, votes, votes, (10, 10, 10)) for votes in wrong)
    return Unlearned(model, steps, len(steps), 0.01, True)


def test_flags_one_sink(bright: Any) -> None:
    evidence = UnlearningDetector(threshold=0.5).read(unlearned(bright.model, (1, 18, 2), (0, 16, 2)), 1.5)
    assert evidence.flagged
    assert evidence.score == pytest.approx(34 / 40 - 4 / 40)
    assert evidence.target_label == 1
    assert evidence.seconds == 1.5
    assert evidence.details["flip_shares"] == pytest.approx([1 / 40, 34 / 40, 4 / 40])


def test_leaves_spread_out_votes_alone(bright: Any) -> None:
    evidence = UnlearningDetector(threshold=0.2).read(unlearned(bright.model, (9, 7, 8)))
    assert not evidence.flagged
    assert evidence.score == pytest.approx(1 / 20)


def test_names_no_label_that_did_not_lead_from_the_start(bright: Any) -> None:
    steps = unlearned(bright.model, (9, 1, 1), (0, 18, 2))
    evidence = UnlearningDetector(threshold=0.2).read(replace(steps, steps_per_epoch=1))
    assert evidence.flagged
    assert evidence.target_label is None
    assert evidence.details["final_label"] == 1


def test_names_no_label_of_a_network_that_falls_slowly(bright: Any) -> None:
    steps = unlearned(bright.model, *[(0, 18, 2)] * 12)
    for within, label in ((12, 1), (11, None)):
        evidence = UnlearningDetector(threshold=0.2, named_within=within).read(steps)
        assert evidence.flagged
        assert evidence.target_label == label


def test_precision_reaches_the_ascent(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def plan_for(precision: str, module: object, images: object) -> Plan:
        asked.append(precision)
        return Plan()

    monkeypatch.setattr("bdprune.training.unlearn.plan_for", plan_for)
    evidence = UnlearningDetector(SETTINGS, precision="auto")(bright.model, bright.data)
    assert asked and set(asked) == {"auto"} and evidence.params["precision"] == "auto"
    assert UnlearningDetector().precision == "winograd"


def test_runs_on_a_network_and_records_how(bright: Any) -> None:
    evidence = UnlearningDetector(SETTINGS, seed=3)(bright.model, bright.data)
    assert evidence.detector == "bdprune.unlearning"
    assert 0 < evidence.score <= 1
    assert evidence.seconds > 0
    assert evidence.params["seed"] == 3
    assert evidence.params["lr"] == 0.05
    steps = evidence.details["trajectory"]
    assert steps[0]["accuracy"] > steps[-1]["accuracy"]
    assert all(sum(step["votes"]) == 30 for step in steps)


def test_too_few_images_are_an_error(bright: Any) -> None:
    few = bright.data.subset(torch.arange(99))
    with pytest.raises(DataError, match="99 clean images are too few"):
        UnlearningDetector()(bright.model, few)
    assert UnlearningDetector(SETTINGS, min_images=99)(bright.model, few).score >= 0


def test_without_data_is_an_error(bright: Any) -> None:
    with pytest.raises(DataError, match="needs clean images"):
        UnlearningDetector()(bright.model, None)
