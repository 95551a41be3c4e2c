"""NU+NC: which model it searches, the label of a planted trigger, and the published settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bdprune.analysis import SCAN_UNLEARNING, Case, Unlearning
from bdprune.data import CleanData
from bdprune.detectors.neural_cleanse import NeuralCleanseDetector
from bdprune.detectors.nu_neural_cleanse import NUNeuralCleanseDetector
from bdprune.errors import DataError
from bdprune.loops import InvertSettings, Stage
from bdprune.runtime import DEFAULT, clean_accuracy
from bdprune.testing.planted import Planted, planted

QUICK = InvertSettings(stages=(Stage(40, 8),), final=Stage(20, 16, keep=1), rounds=1, only_right=False)


@pytest.fixture(scope="module")
def known() -> Planted:
    return planted()


@pytest.fixture(scope="module")
def case(known: Planted) -> Case:
    return Case(known.backdoored, known.data).in_order()


def test_it_names_the_target_of_a_planted_backdoor(known: Planted, case: Case) -> None:
    found = NUNeuralCleanseDetector(QUICK)(case)
    assert found.details["label"] == known.target and found.detector == "bdprune.nu_neural_cleanse"
    assert found.remarks[-1] == "The size and the flips are those in the unlearned network."
    assert found.triggers[0].target_label == known.target and found.attachments[0].sha256 in case.attachments


def test_the_unlearned_model_is_the_one_of_the_scan(case: Case) -> None:
    NUNeuralCleanseDetector(QUICK)(case)
    assert case.key(Unlearning(SCAN_UNLEARNING, 0, DEFAULT, plain=True)) in case.memo


def test_the_end_has_lost_more_of_the_task_than_the_model_half_way(known: Planted, case: Case) -> None:
    before, half_way, end = (
        clean_accuracy(model.module, known.test.images, known.test.labels)
        for model in (
            known.backdoored,
            NUNeuralCleanseDetector().unlearned(case),
            NUNeuralCleanseDetector(depth="end").unlearned(case),
        )
    )
    assert before > half_way > end


def test_the_published_settings() -> None:
    paper = NUNeuralCleanseDetector.preset("paper")
    assert paper.search == NeuralCleanseDetector.preset("paper").search
    assert (paper.depth, paper.threshold, paper.logarithmic, paper.unlearning.weight_decay) == ("end", 2.0, False, 5e-2)
    assert NUNeuralCleanseDetector.preset("robust") == NUNeuralCleanseDetector()


def test_it_needs_as_many_images_as_the_unlearning(known: Planted) -> None:
    few = CleanData(known.data.images[:40], known.data.labels[:40])
    with pytest.raises(DataError, match="40 clean images are too few"):
        replace(NUNeuralCleanseDetector(), search=QUICK)(Case(known.backdoored, few))
