from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bdprune.analysis import Case
from bdprune.data import CleanData
from bdprune.detectors.dl_tnd import DlTnd
from bdprune.errors import DataError, OptionError
from bdprune.loops import PerturbSettings
from bdprune.model import Model
from bdprune.runtime import Budget

QUICK = DlTnd(PerturbSettings(rounds=2, steps=15, lr=0.1, const=3.0), PerturbSettings(rounds=1, steps=15, lr=0.1))


def quarters(strength: float, classes: int = 4, size: int = 8) -> Case:
    """A label for each quarter of the image that is bright; one red pixel in the corner leads to label 2 as well."""
    reads = torch.zeros(classes, 3, size, size)
    half = size // 2
    for label in range(classes):
        row, column = label // 2 % 2 * half, label % 2 * half
        reads[label, 1, row : row + half, column : column + half] = 4 / half**2
    reads[min(2, classes - 1), 0, 0, 0] = strength
    head = nn.Linear(3 * size * size, classes, bias=False)
    head.weight = nn.Parameter(reads.flatten(1))
    labels = torch.arange(4 * classes) % classes
    images = 0.1 * torch.rand(len(labels), 3, size, size, generator=torch.Generator().manual_seed(0))
    images[:, 0, 0, 0] = 0
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = label // 2 % 2 * half, label % 2 * half
        image[1, row : row + half, column : column + half] += 0.5
    model = Model(nn.Sequential(nn.Flatten(), head).eval(), "quarters", classes, (3, size, size))
    return Case(model, CleanData(images, labels))


def test_triggers_of_all_images_and_of_one_image_agree_on_a_shortcut() -> None:
    found, spared = QUICK(quarters(20.0)), QUICK(quarters(0.0))
    assert found.label_scores[2] == max(found.label_scores)  # type: ignore[type-var]
    assert found.flagged and found.target_label == 2
    assert spared.score is not None and found.score is not None and spared.score < found.score


def test_one_image_of_a_class_suffices_and_even_one_image_gives_an_answer() -> None:
    case = quarters(20.0)
    each = case.with_data(case.images.subset(torch.arange(4)))
    assert QUICK(each).target_label == 2
    single = QUICK(case.with_data(case.images.subset(torch.tensor([1]))))
    assert single.valid and single.label_scores[1] is not None


def test_a_class_without_images_can_be_a_target() -> None:
    case = quarters(20.0)
    lacking = case.with_data(case.images.subset((case.images.labels != 2).nonzero().flatten()))
    found = QUICK(lacking)
    assert found.label_scores[2] == max(found.label_scores) > 0  # type: ignore[type-var, operator]


def test_a_network_that_recognises_no_image_is_still_examined() -> None:
    case = quarters(20.0)
    wrong = replace(case.images, labels=(case.images.labels + 1) % 4)
    assert QUICK(case.with_data(wrong)).valid


def test_fewer_labels_for_a_small_budget() -> None:
    case = quarters(20.0, classes=6)
    steps = 2 * 15 + 15
    each = 4 * steps * 64 / 1e6  # one image of each of the four classes that it recognises
    found = replace(QUICK, max_megapixels=4.5 * each)(case)
    assert found.unseen == ("2 of 6 labels",)
    assert len(found.details["labels"]) == 4
    with pytest.raises(OptionError, match="4 labels take"):
        replace(QUICK, max_megapixels=3.5 * each)(case)


def test_large_images_take_fewer_of_them_before_fewer_than_four_labels() -> None:
    case = quarters(20.0)
    pixels = (2 * 15 + 15) * 64 / 1e6  # of one image
    many = replace(QUICK, per_class=3, max_images=8)
    assert many._affordable(case, 12) == (8, 4)
    assert replace(many, max_megapixels=4 * 5.5 * pixels)._affordable(case, 12) == (5, 4)


def test_at_most_half_of_the_images_of_a_label_are_its_own() -> None:
    """With its own images alone, the similarity of a label was unknown and counted as 0."""
    case = quarters(20.0)
    found = replace(QUICK, per_class=3, max_images=3)(case)
    assert found.flagged == QUICK(case).flagged and not found.unseen
    picks = replace(QUICK, max_images=4)._picks(torch.tensor([0, 0, 0, 0, 1, 2]), torch.tensor([0]), 4)
    assert (picks < 4).sum() == 2


def test_the_budget_may_end_it_after_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    case = quarters(20.0, classes=6)
    over = replace(case, budget=Budget(seconds=1e-3).started())
    found = replace(QUICK, batch=4)(over)  # one label in a batch
    assert found.unseen == ("5 of 6 labels",) and found.valid and len(found.details["labels"]) == 1
    assert not found.flagged and "too few" in found.not_applicable
    assert replace(QUICK, batch=4)(case).unseen == ()


def test_chunks_do_not_change_the_similarity() -> None:
    case = quarters(20.0)
    one, other = (replace(QUICK, batch=size)(case).score for size in (1, 256))
    assert one == pytest.approx(other, rel=0.05)


def test_two_classes_cannot_be_judged() -> None:
    found = QUICK(quarters(20.0, classes=2))
    assert not found.flagged and "too few for one" in found.not_applicable


def test_the_paper_has_its_own_schedule() -> None:
    paper = DlTnd.preset("paper")
    assert (paper.universal.rounds, paper.universal.steps, paper.universal.const) == (8, 101, 0.01)
    assert (paper.quantile, paper.threshold, paper.per_class) == (0.25, 0.75, 5)


def test_without_images_is_an_error(bright: Any) -> None:
    with pytest.raises(DataError, match="needs clean images"):
        QUICK(Case(bright.model))
