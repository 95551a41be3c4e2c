"""The detector that prunes the filters which a recovered trigger raises."""

from __future__ import annotations

import pytest
import torch

from bdprune.analysis import Case
from bdprune.detectors.trigger_pruning import TriggerPruningDetector
from bdprune.loops import InvertSettings, Stage, Trigger
from bdprune.runtime import Budget
from bdprune.testing.planted import Planted, planted


@pytest.fixture(scope="module")
def known() -> Planted:
    return planted()


def test_a_planted_backdoor_can_be_pruned_at_no_cost(known: Planted) -> None:
    found = TriggerPruningDetector(kinds=("patch",))(Case(known.backdoored, known.data))
    assert found.flagged and found.target_label == known.target
    points = found.details["triggers"][0]["points"]
    assert points[0][0] == 0 and [one[0] for one in points] == sorted({one[0] for one in points})
    assert "instead of" in found.remarks[0]


def test_the_clean_twin_is_not_flagged(known: Planted) -> None:
    found = TriggerPruningDetector(kinds=("patch",))(Case(known.clean, known.data))
    assert not found.flagged and found.target_label is None


def test_triggers_that_the_time_did_not_suffice_for_are_named(known: Planted) -> None:
    trigger = Trigger(torch.zeros(1, 16, 16), torch.zeros(3, 16, 16), target=known.target, flip_rate=0.9)
    late = Case(known.backdoored, known.data).with_budget(Budget(seconds=1e-6).started())
    found = TriggerPruningDetector()._evidence(late, InvertSettings(), [trigger], [])
    assert found.score == 0.0 and found.unseen == (f"pruning of the triggers patch to label {known.target}",)


def test_without_a_trigger_that_works_the_score_is_zero(known: Planted) -> None:
    idle = InvertSettings(stages=(Stage(1, 2),), final=Stage(1, 2, keep=1), rounds=0)
    found = TriggerPruningDetector(idle, ("patch",))(Case(known.clean, known.data))
    assert found.score == 0.0 and "No recovered trigger" in found.remarks[0]
