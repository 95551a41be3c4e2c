from typing import Any

import pytest
import torch
from torch import nn

from bdprune.analysis import Case
from bdprune.data import CleanData
from bdprune.detectors.latent_margin import LatentMarginDetector
from bdprune.errors import DataError
from bdprune.model import Model
from bdprune.testing import planted


def linear(weight: torch.Tensor) -> Model:
    """A network whose features are its pixels."""
    head = nn.Linear(weight.shape[1], len(weight), bias=False)
    head.weight = nn.Parameter(weight)
    return Model(nn.Sequential(nn.Flatten(), head).eval(), "linear", len(weight), (1, 1, weight.shape[1]))


def pixels(classes: int, features: int) -> CleanData:
    """One bright pixel for each class."""
    images = torch.zeros(classes, features)
    images[torch.arange(classes), torch.arange(classes)] = 1
    return CleanData(images.view(classes, 1, 1, features).repeat(3, 1, 1, 1), torch.arange(classes).repeat(3))


def test_a_label_with_a_strong_weight_on_a_quiet_feature_stands_out() -> None:
    weight = torch.cat([torch.eye(5), torch.zeros(5, 1)], 1)
    data = pixels(5, 6)
    clean = LatentMarginDetector()(Case(linear(weight.clone()), data))
    weight[3, 5] = 4.0
    found = LatentMarginDetector()(Case(linear(weight), data))
    assert not clean.flagged and clean.target_label is None
    assert clean.score == pytest.approx(0, abs=1e-3)
    assert found.flagged and found.target_label == 3
    assert found.label_scores.index(max(found.label_scores)) == 3  # type: ignore[type-var]


def test_a_planted_backdoor_is_found_and_its_clean_twin_is_not() -> None:
    world = planted()
    found, spared = (LatentMarginDetector()(Case(one, world.data)) for one in (world.backdoored, world.clean))
    assert found.flagged and found.target_label == world.target
    assert not spared.flagged


def test_the_paper_moves_all_images_by_plain_shifts() -> None:
    paper = LatentMarginDetector.preset("paper")
    assert (paper.quantile, paper.scaled) == (1.0, False)


def test_two_classes_cannot_be_judged() -> None:
    case = Case(linear(torch.eye(2)), pixels(2, 2).subset(torch.tensor([0, 1] * 5)))
    found = LatentMarginDetector()(case)
    assert found.score == 0 and "too few for one" in found.not_applicable


def test_a_network_without_a_linear_head_cannot_be_judged() -> None:
    network = nn.Sequential(nn.Conv2d(1, 5, (1, 6)), nn.Flatten()).eval()
    found = LatentMarginDetector()(Case(Model(network, "conv", 5, (1, 1, 6)), pixels(5, 6)))
    assert found.score == 0 and "linear layer" in found.not_applicable


def test_a_network_that_ignores_its_input_cannot_be_judged() -> None:
    network = linear(torch.zeros(5, 6))
    with torch.no_grad():
        network.network[1].bias = nn.Parameter(torch.arange(5.0))
    found = LatentMarginDetector()(Case(network, pixels(5, 6)))
    assert not found.flagged and found.not_applicable


def test_nine_images_are_too_few(bright: Any) -> None:
    with pytest.raises(DataError, match="9 clean images are too few"):
        LatentMarginDetector()(Case(bright.model, bright.data.subset(torch.arange(9))))


def test_many_classes_take_seconds() -> None:
    generator = torch.Generator().manual_seed(0)
    model = linear(torch.randn(1000, 32, generator=generator))
    data = CleanData(torch.rand(40, 1, 1, 32, generator=generator), torch.arange(40))
    found = LatentMarginDetector()(Case(model, data))
    assert found.valid and len(found.label_scores) == 1000
