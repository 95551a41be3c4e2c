from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bdprune.data import CleanData
from bdprune.errors import DataError
from bdprune.methods.held_out import hold_out, shifted_views, sure_drop, views_drop
from bdprune.model import Model
from bdprune.runtime import clean_accuracy, predict


def test_both_parts_have_every_class() -> None:
    data = CleanData(torch.rand(30, 3, 4, 4), torch.arange(30) % 3)
    rest, held = hold_out(data, 0.3, 0)
    assert (len(rest), len(held)) == (21, 9)
    assert rest.class_counts == {0: 7, 1: 7, 2: 7} and held.class_counts == {0: 3, 1: 3, 2: 3}


def test_one_image_of_each_class_cannot_be_split() -> None:
    data = CleanData(torch.rand(3, 3, 4, 4), torch.arange(3))
    with pytest.raises(DataError, match="leave none to hold out"):
        hold_out(data, 0.3, 0)


class Says(nn.Module):
    """Predicts label 1 for images whose first value is above a threshold, else 0."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        above = images[:, 0, 0, 0] > self.threshold
        return torch.stack([~above, above], 1).float()


def test_a_fall_counts_beyond_its_standard_error() -> None:
    images = torch.arange(100.0).view(-1, 1, 1, 1).expand(-1, 1, 2, 2) / 100
    held = CleanData(images, (torch.arange(100) >= 50).long())
    right, worse = (Model(Says(at), "says", 2, (1, 2, 2)) for at in (0.495, 0.535))
    assert sure_drop(right, right, held) == 0.0
    # Four of 100 images are lost: 0.04 less sqrt(0.04 * 0.96 * 100 / 99) / 10.
    assert sure_drop(right, worse, held) == pytest.approx(0.04 - 0.0196946, abs=1e-6)
    assert sure_drop(worse, right, held) == pytest.approx(-0.04 - 0.0196946, abs=1e-6)


def test_the_fall_on_views_counts_images_and_shifted_ones(bright: Any) -> None:
    other = bright.model.clone()
    with torch.no_grad():
        other.network.get_parameter("8.bias")[0] += 1.0
    images, labels = shifted_views(bright.data, 4, 7), bright.data.labels.repeat(4)
    first, then = (clean_accuracy(one.module, images, labels) for one in (bright.model, other))
    sure = sure_drop(bright.model, other, bright.data)
    assert views_drop(bright.model, other, bright.data, 7) == pytest.approx(max(first - then, sure)) and first > then
    assert views_drop(bright.model, bright.model, bright.data, 7) == 0


def test_labels_of_the_network_count_on_the_images_themselves(bright: Any) -> None:
    """On views of few images, shifted views hid a fall of 20 points."""
    other = bright.model.clone()
    with torch.no_grad():
        other.network.get_parameter("8.bias")[0] += 3.0
    noise = torch.rand(bright.data.images.shape, generator=torch.Generator().manual_seed(0))
    own = replace(bright.data, images=noise, labels=predict(bright.model.module, noise))
    assert views_drop(bright.model, other, own, 0) >= sure_drop(bright.model, other, own) > 0
