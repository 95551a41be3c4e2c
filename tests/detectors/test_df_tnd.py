from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bdprune.analysis import Case
from bdprune.detectors.df_tnd import DfTnd
from bdprune.loops import ActivationSettings
from bdprune.model import Model

QUICK = DfTnd(ActivationSettings(steps=15, restarts=2), inputs=4, threshold=9.0)


def corners(count: int = 6, strong: float = 1.0, size: int = 4) -> Model:
    """Feature k reads pixel k and raises label k; the last feature raises its label ``strong`` times as much."""
    reads, head = nn.Linear(size * size, count), nn.Linear(count, count)
    with torch.no_grad():
        for layer in (reads, head):
            layer.weight.zero_()
            layer.bias.fill_(0.1)
        reads.weight[torch.arange(count), torch.arange(count)] = torch.linspace(1, 1.5, count)
        reads.weight[-1] *= strong
        head.weight.copy_(torch.eye(count))
    return Model(nn.Sequential(nn.Flatten(), reads, nn.ReLU(), head).eval(), "corners", count, (1, size, size))


def test_the_label_of_the_strongest_feature_stands_out() -> None:
    found = QUICK(Case(corners(strong=20)))
    assert found.flagged and found.target_label == 5
    assert found.details["labels"] == [5, 5]
    assert found.label_scores[5] == found.score
    spared = QUICK(Case(corners()))
    assert spared.score is not None and found.score is not None and spared.score < found.score / 3


def test_the_paper_compares_the_rise_with_a_hundred_logits() -> None:
    short = ActivationSettings(alone_steps=5, steps=5, shared=False, restarts=1, decays=False)
    paper = DfTnd.preset("paper", search=short)
    found = paper(Case(corners(strong=20)))
    assert found.threshold == 100 and not found.flagged
    assert found.score == pytest.approx(max(found.details["rises"][0]))
    assert found.score == pytest.approx(15, rel=0.4)  # from pixels of about 0.5 to 1, times 30


def test_clean_images_do_not_matter(bright: Any) -> None:
    detector = replace(QUICK, search=ActivationSettings(steps=2))
    one, other = (detector(Case(bright.model, data)) for data in (None, bright.data))
    assert one.details == other.details


def test_large_images_get_fewer_restarts_and_say_so() -> None:
    model = corners(size=4)
    each = 15 * 16 / 1e6  # megapixels of one image in all steps
    assert QUICK(Case(model)).limits == ()
    fewer = replace(QUICK, max_megapixels=6 * each)(Case(model))
    assert fewer.limits == ("The images are large, so it used 3 random images and 2 restarts.",)
    least = replace(QUICK, max_megapixels=0.0)(Case(model))
    assert least.limits == ("The images are large, so it used 2 random images and 1 restarts.",)
    assert len(least.details["rises"]) == 1


def test_a_network_without_a_linear_head_cannot_be_judged() -> None:
    network = nn.Sequential(nn.Conv2d(1, 5, 4), nn.Flatten()).eval()
    found = QUICK(Case(Model(network, "conv", 5, (1, 4, 4))))
    assert found.score == 0 and "linear layer" in found.not_applicable


def test_a_network_that_ignores_its_input_cannot_be_judged() -> None:
    model = corners()
    with torch.no_grad():
        model.network[1].weight.zero_()
    found = QUICK(Case(model))
    assert not found.flagged and "do not depend on the image" in found.not_applicable


def test_two_classes_cannot_be_judged() -> None:
    found = QUICK(Case(corners(2, strong=20)))
    assert not found.flagged and "too few for one" in found.not_applicable


def test_a_thousand_classes_and_large_images_stay_within_the_budget() -> None:
    found = DfTnd(max_megapixels=1.0)(Case(corners(1000, size=64)))
    assert found.valid and found.limits and len(found.label_scores) == 1000
