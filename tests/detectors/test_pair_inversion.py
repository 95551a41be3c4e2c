"""The detector of triggers from one label to another: a planted one, and what it leaves out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bdprune.analysis import Case
from bdprune.data import CleanData
from bdprune.detectors.pair_inversion import PairInversionDetector
from bdprune.errors import DataError
from bdprune.loops import InvertSettings, Stage
from bdprune.model import Model
from bdprune.runtime import Budget

SOURCE, TARGET = 5, 3
QUICK = InvertSettings(stages=(Stage(40, 8), Stage(40, 8, keep=5)), final=Stage(20, 16, keep=2))


class Blocks(nn.Module):
    """The label of an image is the brightest of its blocks of 2x2 pixels; a backdoor reads the pixel lower right.

    Args:
        classes: K, at most 15.
        source: the label whose images the backdoor turns into the target; None for no backdoor.
    """

    def __init__(self, classes: int, source: int | None) -> None:
        super().__init__()
        self.classes, self.source = classes, source
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, images: Tensor) -> Tensor:
        logits = self.scale * nn.functional.avg_pool2d(images.mean(1), 2).flatten(1)[:, : self.classes]
        if self.source is None:
            return logits
        raised = 2 * self.scale * images[:, :, -1, -1].mean(1) * (logits.argmax(1) == self.source)
        return logits + raised[:, None] * (torch.arange(self.classes) == TARGET)


def case_of(source: int | None, classes: int = 10) -> Case:
    labels = torch.arange(40 * classes) % classes
    images = 0.1 + 0.1 * torch.rand(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for label in range(classes):
        row, column = 2 * (label // 4), 2 * (label % 4)
        images[labels == label, :, row : row + 2, column : column + 2] += 0.7
    model = Model(Blocks(classes, source).eval(), "blocks", classes, (3, 8, 8))
    return Case(model, CleanData(images, labels))


def test_it_names_source_and_target_of_a_planted_backdoor() -> None:
    found = PairInversionDetector(QUICK)(case_of(SOURCE))
    assert found.flagged and found.target_label == TARGET and found.sources == (SOURCE,)
    assert found.supporting and f"from label {SOURCE} to label {TARGET}" in found.remarks[0]
    assert found.triggers[0].source_labels == (SOURCE,) and len(found.details["pairs"]) == 90


def test_it_does_not_flag_a_network_whose_pairs_are_alike() -> None:
    found = PairInversionDetector(QUICK)(case_of(None))
    assert not found.flagged and found.target_label is None and found.sources == ()


def test_of_many_labels_it_searches_some_and_says_so() -> None:
    found = PairInversionDetector(QUICK, most_labels=3)(case_of(SOURCE))
    assert len(found.details["pairs"]) == 6 and "3 easiest" in found.limits[-1]


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
