"""The detector of triggers from one label to another: a planted one, and what it leaves out."""

from __future__ import annotations

import pytest

from bdprune.analysis import Case
from bdprune.detectors.pair_inversion import PairInversionDetector
from bdprune.errors import DataError
from bdprune.loops import InvertSettings, Stage
from bdprune.runtime import Budget

from ..written import TARGET, blocks_images, blocks_model

SOURCE = 5
QUICK = InvertSettings(stages=(Stage(40, 8), Stage(40, 8, keep=5)), final=Stage(20, 16, keep=2))
FEW = InvertSettings(stages=(Stage(2, 4),), final=Stage(1, 1, keep=1), rounds=0)


def case_of(source: int | None, classes: int = 10) -> Case:
    return Case(blocks_model(source, classes), blocks_images(classes))


def test_it_names_source_and_target_of_a_planted_backdoor() -> None:
    found = PairInversionDetector(QUICK)(case_of(SOURCE))
    assert found.flagged and found.target_label == TARGET and found.sources == (SOURCE,)
    assert found.supporting and f"from label {SOURCE} to label {TARGET}" in found.remarks[0]
    assert found.triggers[0].source_labels == (SOURCE,) and len(found.details["pairs"]) == 90


def test_it_does_not_flag_a_network_whose_pairs_are_alike() -> None:
    found = PairInversionDetector(QUICK)(case_of(None))
    assert not found.flagged and found.target_label is None and found.sources == ()


def test_of_many_labels_a_first_search_chooses_the_pairs() -> None:
    found = PairInversionDetector(QUICK, most_labels=4)(case_of(SOURCE, classes=14))
    assert found.flagged and found.target_label == TARGET and found.sources == (SOURCE,)
    assert len(found.details["pairs"]) == 12 and len(found.details["targets"]) == 14
    assert found.details["pairs"][0]["source"] == SOURCE and found.details["pairs"][0]["target"] == TARGET
    assert "Of 182 pairs of labels, 12 were searched for" in found.limits[-1] and not found.unseen


def test_of_many_labels_a_clean_network_is_not_flagged() -> None:
    assert not PairInversionDetector(QUICK, most_labels=4)(case_of(None, classes=14)).flagged


def test_targets_beyond_the_limit_of_the_budget_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdprune.analysis.source_search.MOST_LABELS", {"fast": 12})
    case = case_of(SOURCE, classes=14).with_budget(Budget("fast"))
    found = PairInversionDetector(FEW, most_labels=4, source_search=FEW)(case)
    assert len(found.details["targets"]) == 12
    assert found.unseen[0].startswith("patch triggers from one label to labels ")


def test_targets_that_time_does_not_suffice_for_are_named() -> None:
    long = InvertSettings(stages=(Stage(5_000, 64),), rounds=0)
    case = case_of(SOURCE, classes=14).with_budget(Budget("full", seconds=2.0).started())
    found = PairInversionDetector(FEW, most_labels=4, source_search=long)(case)
    assert found.unseen[0].startswith("patch triggers from one label to labels ")


def test_pairs_that_time_does_not_suffice_for_are_named() -> None:
    long = InvertSettings(stages=(Stage(5_000, 64),), rounds=0)
    found = PairInversionDetector(long)(case_of(SOURCE).with_budget(Budget("full", seconds=1.0).started()))
    assert any(one.startswith("patch triggers from") for one in found.unseen)


def test_sources_are_labels_with_images() -> None:
    case = case_of(SOURCE)
    kept = (case.images.labels == SOURCE) | (case.images.labels == 0)
    few = case.with_data(case.images.subset(kept.nonzero().flatten()))
    found = PairInversionDetector(QUICK, most_labels=3)(few)
    assert {one["source"] for one in found.details["pairs"]} <= {0, SOURCE}
    assert "no clean images of labels 1, 2, 3, 4, 6" in found.limits[-1]


def test_it_needs_images() -> None:
    with pytest.raises(DataError, match="needs"):
        PairInversionDetector()(Case(case_of(None).model))
