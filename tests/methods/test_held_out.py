import pytest
import torch

from bdprune.data import CleanData
from bdprune.errors import DataError
from bdprune.methods.held_out import hold_out


def test_both_parts_have_every_class() -> None:
    data = CleanData(torch.rand(30, 3, 4, 4), torch.arange(30) % 3)
    rest, held = hold_out(data, 0.3, 0)
    assert (len(rest), len(held)) == (21, 9)
    assert rest.class_counts == {0: 7, 1: 7, 2: 7} and held.class_counts == {0: 3, 1: 3, 2: 3}


def test_one_image_of_each_class_cannot_be_split() -> None:
    data = CleanData(torch.rand(3, 3, 4, 4), torch.arange(3))
    with pytest.raises(DataError, match="leave none to hold out"):
        hold_out(data, 0.3, 0)
