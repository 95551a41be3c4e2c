"""The detector that raises and prunes the filters which unlearning changes most."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from torch import nn

from bdprune.analysis import SCAN_UNLEARNING, Case, Memo, RaisedPoint, Unlearning
from bdprune.detectors.lipschitz import LipschitzDetector
from bdprune.detectors.moved_filters import MovedFiltersDetector
from bdprune.detectors.suspiciousness import SuspiciousnessDetector
from bdprune.detectors.unlearning import UnlearningDetector
from bdprune.errors import DataError
from bdprune.methods import Detector
from bdprune.model import Model
from bdprune.testing.planted import Planted, planted


@pytest.fixture(scope="module")
def known() -> Planted:
    return planted()


def points(*pruned_accuracies: float) -> list[RaisedPoint]:
    """The network itself, and 4 filters more in each point, which send 80 % of the images to label 1."""
    raised = [RaisedPoint(4 * place, (0.1, 0.8), value) for place, value in enumerate(pruned_accuracies, 1)]
    return [RaisedPoint(0, (0.1, 0.1), 0.9), *raised]


def test_a_label_that_unneeded_filters_lead_to_is_named() -> None:
    found = MovedFiltersDetector()._evidence(points(0.9, 0.5))
    assert found.flagged and found.target_label == 1
    assert found.label_scores == (0.1, 0.8)
    assert "With 4 filters raised, 80% of the images of other labels go to label 1." in found.remarks[0]
    assert "clean accuracy is 90.0% instead of 90.0%" in found.remarks[0]


def test_filters_that_the_clean_task_needs_are_not_flagged() -> None:
    found = MovedFiltersDetector()._evidence(points(0.6, 0.5))
    assert found.score == 0.0 and found.target_label is None
    assert "no label at a small cost" in found.remarks[0]


def test_the_clean_twin_is_not_flagged(known: Planted) -> None:
    found = MovedFiltersDetector()(Case(known.clean, known.data))
    assert not found.flagged and found.target_label is None


@pytest.mark.parametrize("detector", [MovedFiltersDetector(), LipschitzDetector(), SuspiciousnessDetector()])
def test_a_network_without_convs_is_not_judged(known: Planted, detector: Detector) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(known.clean.input_shape), 10)).eval()
    found = detector(Case(Model(network, "linear", 10, known.clean.input_shape), known.data))
    assert not found.flagged and found.valid and "no convolutions" in found.not_applicable


def test_it_uses_the_first_run_of_the_unlearning_detector(known: Planted) -> None:
    memo = Memo()
    case = Case(known.clean, known.data, memo).in_order()
    UnlearningDetector(max_runs=1)(case)
    detector = MovedFiltersDetector()
    assert case.key(Unlearning(SCAN_UNLEARNING, detector.seed, detector.precision, plain=True)) in memo


@pytest.mark.parametrize("kept", [True, False])
def test_it_says_if_filters_are_ranked_at_the_end_of_the_unlearning(known: Planted, kept: bool) -> None:
    case = Case(known.clean, known.data).in_order()
    steps = MovedFiltersDetector().steps(case)
    unlearned = case.get(next(steps))
    plain = steps.send(replace(unlearned, half_way=unlearned.model if kept else None))
    with pytest.raises(StopIteration) as stop:
        steps.send(case.get(plain))
    assert any("at the end of the unlearning" in limit for limit in stop.value.value.limits) is not kept


def test_few_images_are_refused(known: Planted) -> None:
    few = known.data.subset((known.data.labels < 2).nonzero().flatten()[:40])
    with pytest.raises(DataError, match="too few"):
        MovedFiltersDetector()(Case(known.clean, few))


def test_more_images_than_the_limit_are_not_used(known: Planted) -> None:
    detector = MovedFiltersDetector(max_images=100)
    assert len(detector._few(Case(known.clean, known.data))) == 100
