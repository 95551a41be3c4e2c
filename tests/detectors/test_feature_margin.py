from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdprune.analysis import Case, gamma_p_values
from bdprune.data import CleanData
from bdprune.detectors.feature_margin import FeatureMargin
from bdprune.errors import DataError
from bdprune.loops import MarginSettings
from bdprune.model import Model

QUICK = FeatureMargin(MarginSettings(steps=5))


def classes_of(count: int, strong: int | None = None, size: int = 6) -> Case:
    """Eight filters, and a row of weights on them for each label; one label has a far larger row."""
    generator = torch.Generator().manual_seed(0)
    convs = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, count, 1)
    with torch.no_grad():
        for conv in convs:
            for value in conv.parameters():
                value.copy_(torch.randn(value.shape, generator=generator) / 10)
        if strong is not None:
            convs[1].weight[strong] *= 30
    network = nn.Sequential(convs[0], nn.ReLU(), nn.AdaptiveAvgPool2d(1), convs[1], nn.Flatten())
    images = torch.rand(20, 3, size, size, generator=generator)
    model = Model(network.eval(), "convs", count, (3, size, size))
    return Case(model, CleanData(images, torch.arange(20) % count))


def test_the_label_that_outgrows_the_others_is_named() -> None:
    found, spared = QUICK(classes_of(8, strong=5)), QUICK(classes_of(8))
    assert found.flagged and found.target_label == 5
    assert found.label_scores[5] == found.score
    assert found.details["convs_before"] == 1 and found.details["images"] == 6
    assert spared.score is not None and found.score is not None and spared.score < found.score


def linear(strong: int | None) -> Case:
    """Every label has random weights on the pixels; those of one label may be five times as large."""
    weight = torch.randn(8, 108, generator=torch.Generator().manual_seed(0))
    if strong is not None:
        weight[strong] *= 5
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, 8, bias=False))
    network.load_state_dict({"1.weight": weight})
    return Case(Model(network.eval(), "linear", 8, (3, 6, 6)), classes_of(8).images)


def test_the_paper_frees_the_pixels_of_random_images_and_fits_a_gamma_distribution() -> None:
    paper = FeatureMargin.preset("paper", search=MarginSettings(steps=40, lr=0.05, signed=False))
    found, spared = paper(linear(strong=5)), paper(linear(strong=None))
    assert found.details["convs_before"] == 0 and found.details["images"] == 30
    assert found.flagged and found.target_label == 5
    assert spared.score is not None and found.score is not None and spared.score < found.score
    margins = torch.tensor(found.details["margins"])
    assert found.score == pytest.approx(-gamma_p_values(margins)[5].log10().item())


def test_labels_do_not_matter_and_neither_does_the_order() -> None:
    case = classes_of(8)
    mixed = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    data = replace(case.images, images=case.images.images[mixed])
    assert QUICK(case).details == QUICK(case.with_data(data)).details


def test_fewer_images_and_labels_for_a_small_budget() -> None:
    case = classes_of(12, strong=5)
    each = 5 * 36 / 1e6  # megapixels of one image in all steps
    few = replace(QUICK, max_megapixels=36 * each)(case)
    assert few.details["images"] == 3 and not few.unseen
    least = replace(QUICK, max_megapixels=12 * each)(case)
    assert least.details["images"] == 2
    assert least.unseen == ("4 of 12 labels",)
    assert sum(one == one for one in least.details["margins"]) == 8
    assert sum(one is None or one != one for one in least.label_scores) == 4
    assert replace(QUICK, max_megapixels=20 * each)(case).unseen == ("2 of 12 labels",)
    assert replace(QUICK, max_megapixels=0.0)(case).unseen == ("4 of 12 labels",)


@pytest.mark.parametrize("size", [6, 224])
def test_a_thousand_classes_and_large_images_stay_within_the_budget(size: int) -> None:
    case = classes_of(1000, size=size)
    found = replace(QUICK, max_megapixels=0.01)(case)
    assert found.valid and len(found.label_scores) == 1000 and found.unseen


class Unresponsive(nn.Module):
    """Ignores its input."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.arange(5.0))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits + 0 * images.flatten(1).sum(1, keepdim=True)


def test_a_network_that_ignores_its_input_is_not_flagged_for_a_margin_that_it_always_has() -> None:
    found = QUICK(Case(Model(Unresponsive().eval(), "unresponsive", 5, (3, 6, 6)), classes_of(5).images))
    assert not found.flagged and "do not depend on the image" in found.not_applicable


def test_two_classes_cannot_be_judged() -> None:
    assert "too few for one" in QUICK(classes_of(2)).not_applicable


def test_without_images_is_an_error(bright: Any) -> None:
    with pytest.raises(DataError, match="needs clean images"):
        QUICK(Case(bright.model))


def test_logits_that_are_not_finite_give_no_score() -> None:
    case = classes_of(12)
    with torch.no_grad():
        next(case.model.network.parameters()).fill_(torch.nan)
    found = QUICK(case)
    assert not found.flagged and not found.valid
