"""Neural Cleanse: anomaly indices, the label of a planted trigger, the published settings, and budgets."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from bdprune.analysis import Case
from bdprune.data import CleanData
from bdprune.detectors.neural_cleanse import CLEANSING, NeuralCleanseDetector, anomaly_indices
from bdprune.errors import DataError
from bdprune.loops import InvertSettings, PenaltyRule, Stage
from bdprune.model import Model
from bdprune.record import Evidence
from bdprune.runtime import Budget

from ..written import Known, known_networks

QUICK = InvertSettings(stages=(Stage(40, 8), Stage(30, 8)), final=Stage(20, 16, keep=1), rounds=2)


@pytest.fixture(scope="module")
def known() -> Known:
    return known_networks()


@pytest.fixture(scope="module")
def evidence(known: Known) -> Evidence:
    return NeuralCleanseDetector(QUICK)(Case(known.backdoored, known.data))


def test_an_index_is_the_distance_from_the_median_in_deviations() -> None:
    assert anomaly_indices([2.0, 9.0, 10.0, 11.0, 12.0], 0.0) == pytest.approx(
        [8 / 1.4826, 1 / 1.4826, 0.0, -1 / 1.4826, -2 / 1.4826]
    )


def test_equal_sizes_have_no_outlier_by_chance() -> None:
    sizes = [9.9, 10.0, 10.0, 10.0, 10.0]
    assert anomaly_indices(sizes, 0.0)[0] == 100.0, "the published rule flags it"
    assert anomaly_indices(sizes, 1.0)[0] == pytest.approx(0.1)
    assert anomaly_indices([0.0, 0.0], 0.1) == [0.0, 0.0]


def test_of_two_labels_none_is_an_outlier() -> None:
    assert max(anomaly_indices([1.0, 100.0], 0.0)) < 2


def test_it_names_the_target_of_a_planted_trigger(known: Known, evidence: Evidence) -> None:
    assert evidence.flagged and evidence.target_label == known.target == evidence.details["label"]
    assert evidence.label_scores.index(max(one for one in evidence.label_scores if one is not None)) == known.target
    assert evidence.score == evidence.label_scores[known.target]
    assert len(evidence.details["sizes"]) == 10 and all(map(math.isfinite, evidence.details["sizes"].values()))
    (trigger,) = evidence.triggers
    assert trigger.target_label == known.target and evidence.attachments
    assert "and the anomaly index" in evidence.remarks[0]


def test_it_does_not_flag_the_clean_network(known: Known) -> None:
    found = NeuralCleanseDetector(QUICK)(Case(known.clean, known.data))
    assert not found.flagged and found.target_label is None


def test_a_trigger_that_fails_on_new_images_does_not_count(known: Known) -> None:
    found = NeuralCleanseDetector(replace(QUICK, rounds=0), flip_rate=1.0)(Case(known.backdoored, known.data))
    assert not found.flagged and found.score == found.threshold and "too few of them" in found.remarks[0]


def test_a_search_without_success_has_no_outlier(known: Known) -> None:
    idle = InvertSettings(stages=(Stage(1, 2),), final=Stage(1, 2, keep=1), rounds=0)
    found = NeuralCleanseDetector(idle)(Case(known.clean, known.data))
    assert not found.flagged and found.score == 0.0 and found.triggers == ()
    assert found.remarks == ("No trigger flips most images.",)


def test_the_published_settings() -> None:
    paper = NeuralCleanseDetector.preset("paper")
    (stage,) = paper.search.stages
    assert (stage.steps, stage.images, stage.keep, paper.search.success) == (1000, 32, 0, 0.99)
    assert paper.search.penalty == PenaltyRule(first=1e-3, factor=2.0, patience=5, from_zero=True)
    assert (paper.threshold, paper.least_spread, paper.flip_rate) == (2.0, 0.0, 0.0)
    assert NeuralCleanseDetector.preset("robust") == NeuralCleanseDetector(CLEANSING)


def test_the_published_rule_finds_the_target_in_fewer_steps_too(known: Known) -> None:
    published = NeuralCleanseDetector.preset("paper")
    shorter = replace(published, search=replace(published.search, stages=(Stage(150, 16),)))
    found = shorter(Case(known.backdoored, known.data))
    assert found.flagged and found.target_label == known.target


def test_time_that_does_not_suffice_is_reported(known: Known) -> None:
    long = InvertSettings(stages=(Stage(5_000, 64),), rounds=0)
    found = NeuralCleanseDetector(long)(Case(known.clean, known.data).with_budget(Budget(seconds=1.5).started()))
    assert any("patch triggers" in one for one in found.unseen)


def test_it_needs_labelled_images(known: Known) -> None:
    with pytest.raises(DataError, match="needs clean images"):
        NeuralCleanseDetector()(Case(known.clean))
    few = CleanData(known.data.images[:4], known.data.labels[:4])
    with pytest.raises(DataError, match="4 clean images are too few"):
        NeuralCleanseDetector()(Case(known.clean, few))


def test_two_labels_cannot_be_judged() -> None:
    """The index of one of two sizes is at most 0.6745. A scan must not take this for the absence of a trigger."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    data = CleanData(torch.rand(40, 3, 8, 8), torch.arange(40) % 2)
    found = NeuralCleanseDetector(QUICK)(Case(Model(network.eval(), "convs", 2, (3, 8, 8)), data))
    assert not found.flagged and found.score == 0 and "too few" in found.not_applicable
